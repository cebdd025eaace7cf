"""The search for the longest rows that fit, on memory that is given by a formula."""

from __future__ import annotations

import random

import pytest

from ptrain.plan.longest import longest

pytestmark = pytest.mark.torch_free
MOST = 0.9


@pytest.mark.parametrize("seed", range(20))
def test_it_is_found_in_few_looks(seed: int) -> None:
    """Memory is the largest of some straight lines, as when different layers have the peak for different lengths."""
    drawn = random.Random(seed)
    for _ in range(50):
        lines = [(drawn.uniform(0, 0.8), 10 ** drawn.uniform(-8, -3)) for _ in range(drawn.randint(1, 4))]
        step, looks = drawn.choice([1, 8, 64]), []

        def share(length: int, lines: list[tuple[float, float]] = lines, looks: list[int] = looks) -> float:
            looks.append(length)
            return max(kept + length * each for kept, each in lines)

        found = longest(share, step, drawn.choice([8, 4096]), MOST)
        limit = min((MOST - kept) / each for kept, each in lines)
        assert found % step == 0 and len(looks) <= 20 and len(set(looks)) == len(looks)
        if found:
            assert limit - max(step, 0.006 * limit) <= found <= limit
        else:
            assert limit < step
