"""Optimizer, loop, checkpoints."""
