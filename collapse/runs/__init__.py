"""Runs trainings in parallel, manages their folder, publishes their results."""
