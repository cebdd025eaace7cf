"""What the benchmarks conclude from what they measured."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(name: str) -> ModuleType:
    """A module that is no part of a distribution."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[f"benchmark_{name}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """What all benchmarks share."""
    return loaded("harness")


def measured(median: float, apart: float) -> dict[str, float]:
    """A ratio whose rounds are so far apart, as a share of their median."""
    return {"median": median, "lowest": median * (1 - apart / 2), "highest": median * (1 + apart / 2)}


@pytest.mark.parametrize(
    ("better", "now", "then", "says"),
    [
        ("more", measured(2.0, 0.05), measured(2.0, 0.05), None),
        ("more", measured(1.85, 0.05), measured(2.0, 0.05), None),
        ("more", measured(1.7, 0.05), measured(2.0, 0.05), "worse than recorded"),
        ("more", measured(3.0, 0.05), measured(2.0, 0.05), None),
        ("less", measured(1.3, 0.05), measured(1.1, 0.05), "worse than recorded"),
        ("less", measured(0.9, 0.05), measured(1.1, 0.05), None),
        ("less", measured(1.1, 0.01), measured(1.07, 0.01), "1.10x instead of 1.07x, noise 2%"),
        ("less", measured(1.0, 0.3), measured(1.0, 0.1), "too noisy"),
        ("more", measured(2.0, 0.05), None, None),
    ],
)
def test_worse_by_more_than_the_noise(
    harness: ModuleType, better: str, now: dict[str, float], then: dict[str, float] | None, says: str | None
) -> None:
    """Which is how far the rounds of both were apart."""
    found = harness._judge("speed", harness.Ratio("a.n", "b.n", better), now, then)
    assert found is None if says is None else says in found


def test_ratios_are_taken_within_a_round(harness: ModuleType) -> None:
    """A slow round is slow for both cases."""
    rounds: list[Any] = [{"a": {"n": 2.0 * slow}, "b": {"n": 1.0 * slow}} for slow in (1.0, 5.0, 2.0)]
    found = harness._ratios(rounds, {"speed": harness.Ratio("a.n", "b.n", "more")})
    assert found == {"speed": {"median": 2.0, "lowest": 2.0, "highest": 2.0}}


def test_pictures_show_what_is_recorded() -> None:
    """Each is what would be drawn now: `python benchmarks/pictures.py` draws them again."""
    pictures = dict(loaded("pictures").drawn())
    assert pictures and all(path.read_text(encoding="utf-8") == text for path, text in pictures.items())


def test_the_gpu_benchmark_in_small(tmp_path: Path) -> None:
    """On whatever device there is: each figure, and the five largest costs of both."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--shape", "tiny", "--length", "256"]
    command += ["--steps", "1", "--rounds", "1"]
    subprocess.run([*command, "--json", str(tmp_path / "found.json")], check=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ratios"]["tokens per second, ptrain to bare"]["median"] > 0
    for numbers in found["cases"].values():
        assert 0 < numbers["MFU"] < 1 and numbers["tokens/s"] > 0 and numbers["GiB"] > 0
        costs = [share for name, share in numbers.items() if name.startswith("% ")]
        assert len(costs) == 5 and costs == sorted(costs, reverse=True) and sum(costs) < 100
