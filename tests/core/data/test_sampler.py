"""The sampler: a pure function of (seed, step) that the number of workers only deals out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ptrain.data.sampler import StepSampler

CUTS = [(8, 1, 1), (4, 2, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 2, 4)]


@given(rows=st.integers(1, 100), seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
def test_every_row_once_an_epoch(rows: int, seed: int, epoch: int) -> None:
    """Nothing is dropped or repeated; the last step is smaller; each epoch has an order of its own."""
    sampler = StepSampler(rows, 2, 2, 0, 2, seed)
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    seen = [sampler.step_rows(step) for step in steps]
    assert sorted(row for step in seen for row in step) == list(range(rows))
    assert all(len(step) == 8 for step in seen[:-1]) and 1 <= len(seen[-1]) <= 8
    if rows > 20:
        assert sampler.order(epoch).tolist() != sampler.order(epoch + 1).tolist()


@given(rows=st.integers(1, 60), seed=st.integers(0, 1000), step=st.integers(0, 20))
def test_the_cut_does_not_matter(rows: int, seed: int, step: int) -> None:
    """The rows of a step are the same for every cut, and the workers share them out without overlap."""
    whole = StepSampler(rows, 8, 1, 0, 1, seed).step_rows(step)
    for micro, accumulation, world in CUTS:
        dealt = []
        for rank in range(world):
            lists = StepSampler(rows, micro, accumulation, rank, world, seed).micro_batches(step)
            assert len(lists) == accumulation and all(len(one) <= micro for one in lists)
            dealt.append(lists)
        joined = [row for j in range(accumulation) for rank in range(world) for row in dealt[rank][j]]
        assert joined == whole


def test_a_step_is_found_without_those_before() -> None:
    """Resuming asks for any step first."""
    sampler = StepSampler(50, 2, 3, 0, 1, 7)
    straight = [sampler.micro_batches(step) for step in range(40)]
    assert [StepSampler(50, 2, 3, 0, 1, 7).micro_batches(step) for step in range(39, -1, -1)] == straight[::-1]


def test_the_first_batch_over_and_over() -> None:
    """`overfit_first_batch`."""
    sampler = StepSampler(50, 2, 2, 0, 1, 7, fixed=True)
    assert all(sampler.step_rows(step) == StepSampler(50, 2, 2, 0, 1, 7).step_rows(0) for step in (0, 5, 100))
