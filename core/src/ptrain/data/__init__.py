"""The data path: sources, rendering and masks, packing, cache, sampler, collate. Pure functions, no hooks."""
