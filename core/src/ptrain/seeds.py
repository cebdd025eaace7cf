"""Randomness as a pure function of (seed, optimizer step, worker).

Every generator is seeded anew at each optimizer step, so a resumed run draws what the uninterrupted one would
have drawn, with no generator state to save, and an evaluation in between changes nothing.
"""

from __future__ import annotations

import hashlib
import random


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all `parts`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(seed: int, step: int | str, rank: int = 0, shard: int = 0) -> None:
    """Seed Python's, numpy's and torch's generators (all devices).

    Args:
        rank: of this worker among those that read different rows.
        shard: of this worker among those that share its rows. Torch alone draws something else for each, such as
            dropout, of which each has the part of its own positions; what is decided of rows is the same for all.
    """
    import numpy as np
    import torch

    value = derived_seed(seed, step, rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(derived_seed(seed, step, rank, "shard", shard) if shard else value)
