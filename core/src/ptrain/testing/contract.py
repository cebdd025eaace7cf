"""`contract`: what is promised of a plugin, as a test function of its own test suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def contract(
    kind: str, name: str, recipe: Mapping[str, Any] | Callable[[Path], Mapping[str, Any]] | None = None
) -> Any:
    """A test function with one case for each check that applies to plugins of this kind:

        from ptrain.testing import contract

        test_contract = contract("trainer", "my-trainer")

    Args:
        kind: "trainer", "plugin" (a feature), "model", "source", "tokenizer", "optimizer", "scheduler", "checkpoint",
            "tracker" or "evaluator".
        name: what a recipe calls it.
        recipe: keys that the tiny recipe of the checks needs besides, e.g. required ones; or a function that returns
            them, given a folder in which it may write files.

    Raises:
        ValueError: there is no such kind.
    """
    import pytest

    from ptrain.testing.checks import FAILED, LEFT_OUT, applicable
    from ptrain.testing.study import Study

    checks = applicable(kind)
    studies: list[Study] = []

    @pytest.mark.parametrize("check", checks, ids=[check.name for check in checks])
    def test(check: Any, ptrain_material: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
        if not studies:
            studies.append(Study(kind, name, recipe, tmp_path_factory.mktemp(f"{kind}-{name}"), ptrain_material.model))
        outcome = check.outcome(studies[0])
        if outcome.state == FAILED:
            pytest.fail(outcome.reason, pytrace=False)
        if outcome.state == LEFT_OUT:
            pytest.skip(outcome.reason)

    test.__doc__ = f"What is promised of the {kind} `{name}`."
    return test
