"""A training run for each framework: its own loss and ours, from the same state, on real text."""
