"""What docs/explanation/compatibility.md promises: a plugin that was written for an older core keeps running."""

from __future__ import annotations

import types
from collections.abc import Generator
from typing import Any

import pytest

import ptrain
from ptrain import hooks
from ptrain import layer as layer_module
from ptrain import stack as stacks
from ptrain.errors import PluginError
from ptrain.layer import Layer
from ptrain.stack import Stack

pytestmark = pytest.mark.torch_free


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core whose stages `count` and `on_step_end` have one more argument, and which has a stage more."""

    @hooks.hookspec(firstresult=True)
    def count(run: Any, batch: Any, sharded: bool) -> Any:
        """Return a count. Kind: first."""

    @hooks.hookspec
    def on_step_end(run: Any, result: Any, seconds: float) -> None:
        """Observe the end of a step. Kind: all."""

    @hooks.hookspec(firstresult=True)
    def choose_rows(run: Any, rows: Any) -> Any:
        """Return rows. Kind: first."""

    specs = types.ModuleType("newer_hooks")
    vars(specs).update(vars(hooks), count=count, on_step_end=on_step_end, choose_rows=choose_rows)
    stages = {name: spec for name, spec in vars(specs).items() if hasattr(spec, "ptrain_spec")}
    monkeypatch.setattr(stacks, "hooks", specs)
    monkeypatch.setattr(stacks, "STAGES", stages)
    monkeypatch.setattr(layer_module, "STAGES", stages)


class Core:
    """The defaults of the newer core."""

    @ptrain.hookimpl
    def count(self, run: Any, batch: Any, sharded: bool) -> dict[str, float]:
        return {"loss": batch / 2 if sharded else batch}

    @ptrain.hookimpl
    def choose_rows(self, rows: Any) -> Any:
        return rows


class Old:
    """A plugin from before: it implements, wraps, observes and has callbacks, all without the new arguments."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.callbacks = (
            ("pre-count", lambda batch: {"batch": batch + 1}),
            ("post-count", lambda run, result: {**result, "post": 1.0}),
        )

    @ptrain.hookimpl(wrapper=True)
    def count(self, run: Any, batch: Any) -> Generator[None, Any, Any]:
        result = yield
        return {**result, "wrapped": float(batch)}

    @ptrain.hookimpl
    def on_step_end(self, run: Any, result: Any) -> None:
        self.seen.append(result)


class Replaces:
    """A plugin from before that answers."""

    @ptrain.hookimpl
    def count(self, run: Any, batch: Any) -> dict[str, float]:
        return {"loss": 10.0 * batch}


class Written:
    """A plugin for the newer core."""

    @ptrain.hookimpl
    def count(self, batch: Any, sharded: bool) -> dict[str, float]:
        return {"loss": 3.0 * sharded}


def stack(*layers: Any) -> Stack:
    made = [Layer(Core(), "core", "ptrain-core 0.9")]
    return Stack([*made, *(Layer(one, type(one).__name__, "toy 1.0", getattr(one, "callbacks", ())) for one in layers)])


def test_a_plugin_keeps_running_when_a_stage_gains_an_argument(newer: None) -> None:
    old = Old()
    layers = stack(old)
    assert layers.call("count", run=None, batch=3, sharded=True) == {"loss": 2.0, "wrapped": 4.0, "post": 1.0}
    layers.call("on_step_end", run=None, result="done", seconds=1.0)
    assert old.seen == ["done"]
    assert stack(Replaces()).call("count", run=None, batch=3, sharded=True) == {"loss": 30.0}
    assert stack(old).call("choose_rows", run=None, rows=[1]) == [1]


def test_new_ones_get_it(newer: None) -> None:
    assert stack(Written()).call("count", run=None, batch=3, sharded=True) == {"loss": 3.0}


def test_a_plugin_for_a_newer_core_is_refused_by_this_one() -> None:
    """Its requirement says so first (see test_catalog.py); where that is missing, the argument does."""
    core = Layer(ptrain.stages, "core", "ptrain-core 0.1")
    with pytest.raises(PluginError, match=r"`written` \(toy 1\.0\): stage `count` has no argument `sharded`") as caught:
        Stack([core, Layer(Written(), "written", "toy 1.0")])
    assert "expected: some of run, batch" in str(caught.value)
