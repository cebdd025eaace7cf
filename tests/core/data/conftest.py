"""Fixtures of the tests of data; `families` is importable from them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def data_file() -> Callable[[str], Path]:
    """The path of a real data file, or a skip where there is none."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.is_file():
            pytest.skip(f"the data file {name} is not there (see ../shared/data)")
        return path

    return find
