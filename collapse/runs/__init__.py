"""Trainings side by side, their folder, what is published of them."""
