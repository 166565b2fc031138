"""What the training scripts share, from floor to floor."""
