"""The learning-rate schedules that ship with core. Every unit is an optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ptrain.errors import RecipeError
from ptrain.parts import Scheduler
from ptrain.recipe.sections import Count, SchedulerConfig

if TYPE_CHECKING:
    import torch

    from ptrain.run import Run

NAMES = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
"""Those of transformers that need no metric; `reduce_lr_on_plateau` and `greedy` do."""
LEFT: dict[str, Callable[[int, int], float]] = {
    "linear": lambda done, steps: max(0.0, (steps - done) / max(1, steps)),
    "cosine": lambda done, steps: max(0.0, 0.5 * (1.0 + math.cos(math.pi * (done / max(1, steps))))),
    "constant": lambda done, steps: 1.0,
    "constant_with_warmup": lambda done, steps: 1.0,
}
"""What is left of the peak after so many of the steps behind the warm-up, by name.

These are written out although transformers has them: its module imports peft, and bitsandbytes and torch's compiler
with that, wherever they are installed: a fifth of what a run imports, by time.
"""


class HFScheduler(Scheduler):
    """`huggingface`: a schedule of transformers, by name."""

    class Config(SchedulerConfig):
        """Keys of `huggingface`."""

        name: NAMES = "linear"
        """Which schedule."""
        warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
        """The share of all steps in which the rate rises from 0 to its peak, rounded up."""
        warmup_steps: Count | None = None
        """The same as a number of steps; wins over `warmup_ratio`."""
        scheduler_specific_kwargs: dict[str, Any] = {}
        """Further arguments of the schedule."""

    def create(
        self, run: Run, optimizer: torch.optim.Optimizer, total_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule; its last step ends at its end value.

        Raises:
            RecipeError: the schedule refuses `scheduler_specific_kwargs`.
        """
        config = self.config
        warmup = config.warmup_steps
        if warmup is None:
            warmup = math.ceil(config.warmup_ratio * total_steps)
        if config.name in LEFT and not config.scheduler_specific_kwargs:
            return _after_warmup(LEFT[config.name], optimizer, 0 if config.name == "constant" else warmup, total_steps)
        from transformers import get_scheduler

        try:
            return get_scheduler(
                config.name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps,
                scheduler_specific_kwargs=dict(config.scheduler_specific_kwargs) or None,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"the schedule `{config.name}` refuses `scheduler.scheduler_specific_kwargs`: {error}"
            ) from error


def _after_warmup(
    left: Callable[[int, int], float], optimizer: torch.optim.Optimizer, warmup: int, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear from 0 to the peak, then what `left` says."""
    import torch

    def factor(step: int) -> float:
        return step / warmup if step < warmup else left(step - warmup, total_steps - warmup)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class WSDScheduler(Scheduler):
    """`wsd`: linear warm-up, a stable rate, then a linear decay to `min_lr_ratio` (Hu et al. 2024, MiniCPM)."""

    class Config(SchedulerConfig):
        """Keys of `wsd`."""

        num_warmup_steps: Count
        """Steps of the warm-up."""
        num_decay_steps: Count
        """Steps of the decay, at the end."""
        min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
        """The rate at the end, as a share of the peak."""

    def create(
        self, run: Run, optimizer: torch.optim.Optimizer, total_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule.

        Raises:
            RecipeError: warm-up and decay together are longer than the run.
        """
        import torch

        config = self.config
        warmup, decay, low = config.num_warmup_steps, config.num_decay_steps, config.min_lr_ratio
        if warmup + decay > total_steps:
            raise RecipeError(
                f"`scheduler`: {warmup} steps of warm-up and {decay} of decay do not fit in {total_steps} steps",
                fix="make `num_warmup_steps` or `num_decay_steps` smaller, or train longer",
            )

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            left = total_steps - step
            return 1.0 if left >= decay else low + (1.0 - low) * max(left, 0) / decay

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
