"""`console`: a progress bar on a terminal, plain lines where the output is piped."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ptrain.parts import Tracker
from ptrain.recipe.sections import TrackerConfig

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID

    from ptrain.run import Run

BESIDE = 30
"""Columns that the rest of the bar takes at the least, without the numbers of its steps."""

_console: RichConsole | None = None


def console() -> RichConsole:
    """The one console of this process: messages and the bar share it, so that neither breaks the other."""
    global _console
    if _console is None:
        from rich.console import Console

        _console = Console(highlight=False, soft_wrap=True)
    return _console


def say(message: str, *, whole: bool = False) -> None:
    """Print a line, above the bar where there is one; on a terminal it is broken between words, unless `whole`."""
    if console().is_terminal and not whole:
        # Not by rich: it would also break a path that is longer than a line, which is copied in one piece.
        width = console().width
        wrapped = [
            textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in message.split("\n")
        ]
        message = "\n".join("\n".join(lines) for lines in wrapped)
    console().print(message, markup=False)


class Console(Tracker):
    """Step, epoch, loss, learning rate, gradient norm, tokens a second, memory and the time left."""

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
        if self._bar is not None and self._task is not None:
            text = describe(metrics, console().width - BESIDE - 2 * len(str(run.total_steps)))
            self._bar.update(self._task, completed=metrics["step"], text=text)
            return None
        every = run.recipe.loss_log_interval if run.recipe.train_log_iter_interval else 0
        shown = every and (metrics["step"] % every == 0 or metrics["step"] == run.total_steps)
        return say(f"step {metrics['step']}/{run.total_steps} {describe(metrics)}") if shown else None

    def finish(self, run: Run) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()


def describe(metrics: Mapping[str, Any], room: int | None = None) -> str:
    """The metrics of a step on one line of at most `room` characters, the less important ones left out first."""
    parts = {
        "epoch": f"epoch {metrics.get('epoch', math.nan):.2f}",
        "loss": f"loss {metrics['loss']:.4f}",
        "lr": f"lr {metrics.get('lr', math.nan):.2e}",
        "norm": f"norm {metrics.get('grad_norm', math.nan):.2f}",
        "rate": f"{metrics.get('tokens_per_second', 0):,.0f} tok/s",
        "memory": f"{metrics.get('memory_gib', math.nan):.1f} GiB",
    }
    for name in ("memory", "norm", "epoch", "lr", "rate"):
        if room is None or len("  ".join(parts.values())) <= room:
            break
        del parts[name]
    return "  ".join(parts.values())


def _evaluation(metrics: Mapping[str, Any]) -> str:
    shown = {k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/")}
    return "  ".join(f"{k} {v:.1%}" if k.endswith("exact_match") else f"{k} {v:.4f}" for k, v in shown.items())


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(), console=console(), refresh_per_second=4,
    )  # fmt: skip
