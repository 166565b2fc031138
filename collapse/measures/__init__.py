"""What is measured of representations and predictions, and the statistics."""
