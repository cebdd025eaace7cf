"""The learning-rate schedules against those that transformers makes, step by step."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from transformers import get_scheduler

from ptrain.schedulers import LEFT, HFScheduler

PEAK = 3e-4


def rates(make: Any, steps: int) -> list[float]:
    """The rate of each step, and of the one after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule, found = make(optimizer), []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", [*LEFT, "inverse_sqrt"])
@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(1, {}), (7, {}), (100, {"warmup_ratio": 0.05}), (30, {"warmup_steps": 0}), (9, {"warmup_steps": 9})],
)
def test_are_those_of_transformers(name: Any, steps: int, warmup: dict[str, Any]) -> None:
    config = HFScheduler.Config(type="huggingface", name=name, **warmup)
    count = math.ceil(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps
    ours = rates(lambda optimizer: HFScheduler(config).create(cast(Any, None), optimizer, steps), steps)
    assert ours == rates(lambda optimizer: get_scheduler(name, optimizer, count, steps), steps)


def test_arguments_are_those_of_transformers() -> None:
    """A schedule that is written out takes further arguments all the same."""
    config = HFScheduler.Config(type="huggingface", name="cosine", scheduler_specific_kwargs={"num_cycles": 1.5})
    ours = rates(lambda optimizer: HFScheduler(config).create(cast(Any, None), optimizer, 20), 20)
    given = {"num_cycles": 1.5}
    assert ours == rates(lambda o: get_scheduler("cosine", o, 2, 20, scheduler_specific_kwargs=given), 20)


def test_the_usual_ones_import_nothing_of_peft() -> None:
    """It would be a fifth of what a run imports, by time."""
    code = f"""
import sys, torch
from ptrain.schedulers import HFScheduler
for name in {list(LEFT)}:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    HFScheduler(HFScheduler.Config(type="huggingface", name=name)).create(None, optimizer, 10)
assert not {{"peft", "transformers.optimization"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
