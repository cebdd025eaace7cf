"""What is promised of plugins: every check, in the order in which they are made."""

from __future__ import annotations

from ptrain.testing.check import FAILED, LEFT_OUT, OK, Check, Outcome
from ptrain.testing.checks import declared, parts, trained, watched

__all__ = ["ALL", "FAILED", "LEFT_OUT", "OK", "Check", "Outcome", "applicable"]

LAYERS = ("trainer", "plugin")
TRAINED = (*LAYERS, "model", "optimizer", "scheduler", "checkpoint")
ALL = (
    Check("hooks", declared.hooks),
    Check("config", declared.config),
    Check("discovery", watched.discovery),
    Check("imports", watched.imports),
    Check("trains", trained.trains),
    Check("fields", watched.fields),
    Check("batch", trained.batch, (*LAYERS, "model")),
    Check("resume", trained.resume, TRAINED),
    Check("preparation", watched.preparation, LAYERS),
    Check("stages", watched.stages, LAYERS),
    Check("shards", watched.shards, ("trainer",)),
    Check("errors", watched.errors, LAYERS),
    Check("source", parts.source, ("source",)),
    Check("tokenizer", parts.tokenizer, ("tokenizer",)),
    Check("parameters", parts.parameters, ("optimizer",)),
    Check("rates", parts.rates, ("scheduler",)),
    Check("workers", parts.workers, ("checkpoint",)),
    Check("records", parts.records, ("tracker",)),
    Check("merges", parts.merges, ("evaluator",)),
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
