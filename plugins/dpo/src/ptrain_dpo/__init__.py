"""Direct preference optimisation for ptrain: the trainer `dpo`."""
