"""What studies share: own backbones, fine-tuning, sweeps."""
