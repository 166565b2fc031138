"""Pretrained language models, LoRA adapters, GPU memory, losses."""
