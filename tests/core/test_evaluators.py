"""The metrics of several evaluators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ptrain import Evaluator, EvaluatorConfig, RecipeError
from ptrain.evaluators import run_evaluators


class One(Evaluator):
    needs_rows = False

    def evaluate(self, run: Any) -> dict[str, tuple[float, float]]:
        return {"share": (1.0, 4.0)}


class Other(One):
    pass


def measured(*evaluators: Evaluator) -> dict[str, float]:
    """By a run of one worker."""
    run: Any = SimpleNamespace(parts=SimpleNamespace(evaluators=evaluators), eval_data=[], device="cpu")
    return run_evaluators(run)


def test_no_evaluator_replaces_the_metrics_of_another() -> None:
    one = One(EvaluatorConfig(type="one"))
    with pytest.raises(RecipeError, match="two evaluators record `share`"):
        measured(one, Other(EvaluatorConfig(type="other")))
    named = Other(EvaluatorConfig(type="other", name="mine"))
    assert measured(one, named) == {"share": 0.25, "mine/share": 0.25}
