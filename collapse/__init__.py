"""What the experiments stand on; nothing here imports common.py or a script."""
