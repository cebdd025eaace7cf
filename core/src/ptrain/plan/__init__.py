"""What a run will need, told before it runs: steps, rates, memory, disk, and what can't be known."""
