"""Data sets as texts and labels, and how they become batches of tokens."""
