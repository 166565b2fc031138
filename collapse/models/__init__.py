"""Pretrained models, adapters, memory, losses."""
