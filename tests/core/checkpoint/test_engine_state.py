"""The engine's state by parameter: what is gathered and put back continues training as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Start = Callable[[Sequence[Mapping[str, Any]], int], None]


@pytest.fixture
def start(tmp_path: Path, several: Any) -> Start:
    """Runs cases of `engine_worker.py` on a number of workers."""

    def run(cases: Sequence[Mapping[str, Any]], workers: int) -> None:
        several("engine_worker.py", [str(tmp_path)], cases, workers, tmp_path)

    return run


def assert_same(folder: Path, found: str, expected: str, tolerance: float = 0.0) -> None:
    """Losses and weights of two cases agree, bit for bit or nearly."""
    one, two = (load_file(folder / f"{name}.safetensors") for name in (found, expected))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{found} {n}: {m}")


@pytest.mark.parametrize("workers", [1, 2])
def test_going_on_is_exact(workers: int, start: Start, tmp_path: Path) -> None:
    """Over ZeRO stages, dtypes and optimizers whose states differ; other weights were there before."""
    kinds: list[dict[str, Any]] = [{"stage": stage, "dtype": "fp32"} for stage in (0, 1, 2, 3)]
    kinds += [{"stage": stage, "dtype": "bf16"} for stage in (0, 1, 2, 3)]
    kinds += [{"stage": 1, "dtype": "autocast"}]
    kinds += [
        {"stage": stage, "dtype": "fp32", "optimizer": name, "options": options}
        for stage in (0, 2, 3)
        for name, options in (("SGD", {"momentum": 0.9}), ("SGD", {}), ("Adam", {"amsgrad": True}))
    ]
    # ZeRO-3 changes torch for the whole process, so it comes last.
    kinds.sort(key=lambda kind: kind["stage"] == 3)
    cases = []
    for number, kind in enumerate(kinds):
        state = str(tmp_path / f"state-{number}")
        cases += [
            {**kind, "name": f"{number}-whole", "save": state},
            {**kind, "name": f"{number}-again", "load": state},
        ]
    start(cases, workers)
    for number in range(len(kinds)):
        assert_same(tmp_path, f"{number}-again", f"{number}-whole")


def test_the_state_depends_neither_on_the_stage_nor_on_the_workers(start: Start, tmp_path: Path) -> None:
    """Saved by two workers at ZeRO-3, gone on with by one at any stage, and the other way round."""
    state, back = str(tmp_path / "state"), str(tmp_path / "back")
    start([{"stage": 3, "dtype": "fp32", "name": "whole", "save": state}], 2)
    again = [{"stage": stage, "dtype": "fp32", "name": f"one-{stage}", "load": state} for stage in (0, 1, 2, 3)]
    start([{"stage": 1, "dtype": "fp32", "name": "other", "save": back}, *again], 1)
    start([{"stage": 2, "dtype": "fp32", "name": "two", "load": back}], 2)
    for stage in (0, 1, 2, 3):
        assert_same(tmp_path, f"one-{stage}", "whole", 1e-5)
    assert_same(tmp_path, "two", "other", 1e-5)


def test_the_state_of_another_optimizer_is_refused(start: Start, tmp_path: Path) -> None:
    """Rather than made up."""
    state = str(tmp_path / "state")
    case = {"stage": 1, "dtype": "fp32"}
    start([{**case, "name": "sgd", "optimizer": "SGD", "options": {"momentum": 0.9}, "save": state}], 1)
    with pytest.raises(
        RuntimeError, match=r"holds \['momentum_buffer', 'weight'\] of .* this optimizer has \['exp_avg'"
    ):
        start([{**case, "name": "adam", "load": state}], 1)
