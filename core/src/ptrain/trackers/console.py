"""`console`: a progress bar on a terminal, plain lines where the output is piped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ptrain.parts import Tracker
from ptrain.recipe.sections import TrackerConfig

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

    from ptrain.run import Run

_console: RichConsole | None = None


def console() -> RichConsole:
    """The one console of this process: messages and the bar share it, so that neither breaks the other."""
    global _console
    if _console is None:
        from rich.console import Console

        _console = Console(highlight=False, soft_wrap=True)
    return _console


def say(message: str) -> None:
    """Print a line, above the bar where there is one."""
    console().print(message, markup=False)


class Console(Tracker):
    """Step, loss, learning rate, gradient norm, tokens a second and the time left."""

    class Config(TrackerConfig):
        """Keys of `console`."""

    _bar: Progress | None = None
    _task: TaskID | None = None

    def start(self, run: Run) -> None:
        """Show the bar on a terminal."""
        if console().is_terminal:
            self._bar = _progress()
            self._task = self._bar.add_task("", total=run.total_steps, completed=run.progress.step, text="")
            self._bar.start()

    def log(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Move the bar, or print a line each time that `loss_log_interval` says so."""
        if "loss" not in metrics:
            return say(f"evaluation after step {metrics['step']}: {_evaluation(metrics)}")
        text = describe(metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=metrics["step"], text=text)
            return None
        every = run.recipe.loss_log_interval if run.recipe.train_log_iter_interval else 0
        shown = every and (metrics["step"] % every == 0 or metrics["step"] == run.total_steps)
        return say(f"step {metrics['step']}/{run.total_steps} {text}") if shown else None

    def finish(self, run: Run) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()


def describe(metrics: Mapping[str, Any]) -> str:
    """The metrics of a step on one line."""
    return (
        f"loss {metrics['loss']:.4f}  lr {metrics.get('lr', math.nan):.2e}  "
        f"norm {metrics.get('grad_norm', math.nan):.2f}  {metrics.get('tokens_per_second', 0):,.0f} tok/s"
    )


def _evaluation(metrics: Mapping[str, Any]) -> str:
    shown = {k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/")}
    return "  ".join(f"{k} {v:.1%}" if k == "exact_match" else f"{k} {v:.4f}" for k, v in shown.items())


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(), console=console(), refresh_per_second=4,
    )  # fmt: skip
