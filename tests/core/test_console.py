"""The display: one line, however wide the terminal is."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console as RichConsole

from ptrain.trackers import console
from ptrain.trackers.console import Console, describe

pytestmark = pytest.mark.torch_free

METRICS: dict[str, Any] = {
    "step": 123, "loss": 2.34567, "lr": 1e-3, "grad_norm": 1.23, "tokens_per_second": 123456.7, "epoch": 0.12,
    "memory_gib": 0.63,
}  # fmt: skip


@pytest.mark.parametrize(
    ("width", "shown"), [(60, "loss"), (80, "loss lr tok/s"), (200, "epoch loss lr norm tok/s GiB")]
)
def test_the_bar_fits_the_terminal(width: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What matters less is left out first."""
    out = io.StringIO()
    own = RichConsole(file=out, force_terminal=True, width=width, color_system=None, soft_wrap=True, highlight=False)
    monkeypatch.setattr(console, "_console", own)
    display = Console(Console.Config())
    display._bar = console._progress()
    display._task = display._bar.add_task("", total=12345, completed=0, text="")
    run: Any = SimpleNamespace(total_steps=12345)
    display.log(run, METRICS)
    own.print(display._bar.get_renderable())
    (line,) = out.getvalue().splitlines()
    assert len(line) <= width and "123/12345" in line
    names = ("epoch", "loss", "lr", "norm", "tok/s", "GiB")
    assert " ".join(name for name in names if name in line) == shown


def test_the_whole_line() -> None:
    """As it is where the output is piped."""
    assert describe(METRICS) == "epoch 0.12  loss 2.3457  lr 1.00e-03  norm 1.23  123,457 tok/s  0.6 GiB"
