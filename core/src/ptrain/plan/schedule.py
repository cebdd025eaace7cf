"""How many optimizer steps there will be, at which learning rates, and which of them are saved."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ptrain.run import Run

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Rate:
    """The learning rate of the step (from 1) that lies at a share of all steps."""

    share: float
    step: int
    rate: float


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run.

    Attributes:
        total: of the schedule.
        last: after which it stops: `exit_iteration` may be earlier.
        samples: of one step, over all workers.
        per_epoch: in one pass over the rows; None where they are not known.
        rates: the learning rate from the first to the last of `total`.
    """

    total: int
    last: int
    samples: int
    per_epoch: int | None
    rates: list[Rate]

    @property
    def epochs(self) -> float | None:
        """How often the rows are gone through."""
        return self.last / self.per_epoch if self.per_epoch else None


def steps(run: Run, rows: int | None, optimizer: Any, unknown: list[str]) -> Steps | None:
    """The steps; None where they depend on rows that are not known.

    Args:
        rows: training samples, if they are known.
        optimizer: the run's, over parameters on any device; None where the model is not known.

    Raises:
        RecipeError: the schedule does not fit in them.
    """
    from ptrain.loop import last_step
    from ptrain.run import steps_for

    samples = run.recipe.micro_batch_size * run.accumulation * run.data_world
    per_epoch = math.ceil(rows / samples) if rows else None
    if per_epoch is None and not run.recipe.train_iters:
        unknown.append("optimizer steps and learning rates: `epochs` goes by the rows")
        return None
    run.total_steps = steps_for(run.recipe, per_epoch or 0)
    found = rates(run, optimizer or _stand_in(run), run.total_steps) if run.total_steps else []
    return Steps(run.total_steps, last_step(run)[0], samples, per_epoch, found)


def _stand_in(run: Run) -> torch.optim.Optimizer:
    """An optimizer with the rate of the recipe and one number to train."""
    import torch

    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=run.recipe.optimizer.learning_rate)


def rates(run: Run, optimizer: torch.optim.Optimizer, total: int) -> list[Rate]:
    """The rates that the schedule of the recipe gives, as a run records them."""
    schedule = run.call("create_scheduler", optimizer=optimizer, total_steps=total)
    wanted = {share: max(1, math.ceil(share * total)) for share in SHARES}
    by_step = _rates_at(schedule, sorted({*wanted.values()}))
    return [Rate(share, step, by_step[step]) for share, step in wanted.items()]


def _rates_at(schedule: torch.optim.lr_scheduler.LRScheduler, wanted: list[int]) -> dict[int, float]:
    """The rate of each wanted step (in order, from 1): a function is asked, anything else is gone through."""
    from torch.optim.lr_scheduler import LambdaLR

    if isinstance(schedule, LambdaLR) and type(schedule).get_lr is LambdaLR.get_lr:
        peak, factor = schedule.base_lrs[0], schedule.lr_lambdas[0]
        return {step: float(peak * factor(step - 1)) for step in wanted}
    found, done = {}, 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer makes no steps
        for step in wanted:
            for _ in range(step - done):
                schedule.step()
            found[step], done = float(schedule.get_last_lr()[0]), step
    return found
