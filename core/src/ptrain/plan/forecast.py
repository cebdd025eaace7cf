"""The whole plan of a run: what is known of it before it begins, and what is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.plan.devices import Device
from ptrain.plan.disk import Saved, saved
from ptrain.plan.offline import offline
from ptrain.plan.rows import Batch, Rows, largest_batch, padding, prepared_rows, splits
from ptrain.plan.schedule import Steps, steps

if TYPE_CHECKING:
    from ptrain.data.cache import Prepared
    from ptrain.plan.memory import Choice, Memories, Memory
    from ptrain.plan.model import Parameters
    from ptrain.recipe.load import Loaded
    from ptrain.run import Run


USUAL = 8192
"""Tokens of a row, from which the longest is looked for."""


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
        trainer: `type` of the recipe.
        workers: of the whole run.
        device: that each worker computes on.
        rows: of the splits that have some; empty where they are not known.
        padding: the share of what is computed that holds no token.
        batch: the largest micro-batch; of rows as long as can be where they are not known.
        steps: None where they are not known.
        parameters: likewise, as are those below.
        memory: of one worker, as the recipe is.
        others: the same, with one thing chosen differently, by what that is.
        longest: tokens of the longest rows that fit, `micro_batch_size` of them at a time; 0 where none do.
        saved: what is written to the disk.
        warnings: what the recipe needs and this machine lacks.
        unknown: what can't be known, one line each.
    """

    trainer: str
    workers: int
    device: Device
    rows: dict[str, Rows]
    padding: float | None
    batch: Batch
    steps: Steps | None
    parameters: Parameters | None
    memory: Memory | None
    others: list[Choice]
    longest: int | None
    saved: list[Saved]
    warnings: list[str]
    unknown: list[str]


def forecast(loaded: Loaded, directory: Path, workers: int, device: Device) -> Forecast:
    """The plan of a recipe. Data that is here is prepared as for a run, which finds it then; nothing is downloaded.

    Args:
        directory: the run directory, which need not exist.
        workers: of the whole run.

    Raises:
        PtrainError: the recipe, its data or its model is wrong, so that a run would stop.
    """
    from ptrain.recipe.machine import machine_problems
    from ptrain.run import Run

    with offline():
        run = Run(loaded, directory, world=workers, trains=True, data_world=workers)
        unknown: list[str] = []
        prepared = prepared_rows(run, unknown)
        made = _Planned(run, prepared, device, unknown)
        made.plan()
    warnings = [str(problem) for problem in [*loaded.warnings, *machine_problems(loaded)]]
    return Forecast(
        loaded.recipe.type, workers, device, splits(prepared) if prepared else {},
        padding(run, prepared.train) if prepared else None, made.batch, made.steps, made.parameters, made.memory,
        made.others, made.longest, saved(run, made.steps, made.memories), warnings,
        [*unknown, *_never_known(run, device)],
    )  # fmt: skip


class _Planned:
    """What follows from the model, where it is here."""

    def __init__(self, run: Run, prepared: Prepared | None, device: Device, unknown: list[str]) -> None:
        self.run, self.prepared, self.device, self.unknown = run, prepared, device, unknown
        self.rows = prepared.train if prepared is not None else None
        self.batch = largest_batch(run, self.rows, run.recipe.micro_batch_size)
        self.steps: Steps | None = None
        self.parameters: Parameters | None = None
        self.memory: Memory | None = None
        self.others: list[Choice] = []
        self.longest: int | None = None
        self.memories: Memories | None = None

    def plan(self) -> None:
        """Fill everything in; what a run would refuse is refused."""
        import torch

        from ptrain import checks
        from ptrain.plan.model import make_config

        run, prepared = self.run, self.prepared
        run.device = torch.device("meta")
        run.device_memory = None if self.device.kind == "cpu" else self.device.bytes
        if prepared is not None:
            checks.check_evaluation(run, prepared.eval)
            checks.check_rows(run, len(prepared.train))
        optimizer = None
        if make_config(run, self.unknown):
            optimizer = self._of_model()
        count = len(prepared.train) if prepared is not None else None
        self.steps = steps(run, count, optimizer, self.unknown)

    def _of_model(self) -> Any:
        from ptrain import checks
        from ptrain.plan.memory import Memories
        from ptrain.plan.model import make_model, make_optimizer, parameters

        run = self.run
        run.model = model = make_model(run, self.unknown)
        if self.prepared is not None:
            checks.check_given(run, self.prepared.report)
            checks.check_evaluators(run, self.prepared.eval)
            checks.check_packing(run, self.prepared.train)
            checks.check_positions(run, [self.prepared.train, self.prepared.eval], model)
        optimizer = make_optimizer(run, model, self.unknown)
        self.parameters = parameters(model, optimizer)
        self.memories = Memories(run, self.device, self.parameters, self.unknown)
        self.memory = self.memories.of(self.batch)
        self.others = self.memories.others(self.batch, largest_batch(run, self.rows, 1))
        self.longest = self.memories.longest(run.recipe.micro_batch_size, USUAL)
        return optimizer


def _never_known(run: Run, device: Device) -> list[str]:
    """What no plan can know of this run."""
    from ptrain.evaluators import ExactMatch

    if device.kind == "cpu":
        found = ["memory of Python, its libraries and the loaded data, beside the tensors counted here"]
    else:
        found = ["memory of CUDA and NCCL themselves, and what the allocator loses to fragments: leave a tenth free"]
    for layer in run.stack.layers[1:]:
        if any(hasattr(getattr(layer.plugin, stage, None), "ptrain_impl") for stage in ("before_training", "step")):
            found.append(f"memory of what `{layer.name}` does before training and in steps, a second model for example")
    if any(isinstance(part, ExactMatch) for part in run.parts.evaluators):
        found.append("memory of generation in the evaluator `exact_match`, which grows with its `batch_size`")
    return found
