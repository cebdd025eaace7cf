"""Models: create and load, per-document attention, log-probabilities, generation."""
