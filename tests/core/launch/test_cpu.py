"""CPU cores: how many, and how workers share them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain.launch.cpu import cores, parse_core_list, share
from ptrain.launch.environment import LaunchError

pytestmark = pytest.mark.torch_free


@pytest.mark.parametrize(("quota", "most"), [("100000 100000", 1), ("150000 100000", 2), ("max 100000", 10**6)])
def test_cores_respect_a_quota(tmp_path: Path, quota: str, most: int) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    unlimited = cores(tmp_path / "absent")
    assert cores(tmp_path) == min(most, unlimited) >= 1


@given(st.sets(st.integers(0, 40), min_size=1))
def test_a_core_list_is_read_as_written(numbers: set[int]) -> None:
    assert parse_core_list(",".join(map(str, numbers))) == sorted(numbers)


@pytest.mark.parametrize("text", ["1,3-5,7", "7,3-4,5,1", "1, 3-5, 7,7"])
def test_ranges_of_cores(text: str) -> None:
    assert parse_core_list(text) == [1, 3, 4, 5, 7]


@pytest.mark.parametrize("text", ["", "1,", "3-1", "a", "1--2", "-1"])
def test_what_is_no_core_list(text: str) -> None:
    with pytest.raises(LaunchError, match="is no core"):
        parse_core_list(text)


def test_shares_are_equal_and_apart() -> None:
    usable = sorted(os.sched_getaffinity(0))
    for workers in range(1, len(usable) + 1):
        shares = share("", workers)
        assert len(shares) == workers and len({len(one) for one in shares}) == 1
        assert len({core for one in shares for core in one}) == workers * len(shares[0])
