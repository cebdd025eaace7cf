"""Training on very long sequences for ptrain: the feature `sequence-parallel`."""
