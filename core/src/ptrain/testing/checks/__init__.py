"""What is promised of plugins: every check, in the order in which they are made."""

from __future__ import annotations

from ptrain.testing.checks import declared, trained
from ptrain.testing.checks.check import Check, NotApplicable

__all__ = ["ALL", "Check", "NotApplicable", "applicable"]

LAYERS = ("trainer", "plugin")
ALL = (
    Check("hooks", declared.hooks),
    Check("config", declared.config),
    Check("trains", trained.trains),
    Check("batch", trained.batch, (*LAYERS, "model")),
    Check("resume", trained.resume, (*LAYERS, "model", "optimizer", "scheduler", "checkpoint")),
)
"""Every check."""


def applicable(kind: str) -> list[Check]:
    """The checks of plugins of one kind.

    Raises:
        ValueError: there is no such kind.
    """
    from ptrain.parts import KINDS

    if kind not in KINDS:
        raise ValueError(f"there is no kind `{kind}`; there are: {', '.join(KINDS)}")
    return [check for check in ALL if not check.kinds or kind in check.kinds]
