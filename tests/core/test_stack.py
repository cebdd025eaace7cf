"""The stack: order of layers, callbacks, the mistakes that are refused, and how failures are named."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Generator
from typing import Any

import pytest

import ptrain
from ptrain.errors import PluginError
from ptrain.layer import STAGES, Layer
from ptrain.results import StepResult
from ptrain.stack import Stack

pytestmark = pytest.mark.torch_free


class Base:
    """What every plugin here has."""

    callbacks: Any = ()


class FakeRun:
    """Only what the stack itself uses of a run."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        """Keep the warning."""
        self.warned.append(message)


class Core(Base):
    """Stands in for core's defaults."""

    @ptrain.hookimpl
    def count(self, run: Any, batch: Any) -> dict[str, float]:
        """The batch as a number."""
        return {"loss": batch}

    @ptrain.hookimpl
    def step(self, run: Any, batches: Any) -> StepResult:
        """The length."""
        return StepResult(float(len(batches)))


def stack(*plugins: Any, user: Any = None) -> Stack:
    """Layers above `Core`, named after their classes."""
    layers = [Layer(Core(), "core", "ptrain-core 0")]
    layers += [Layer(p, type(p).__name__.lower(), "toy 1.0", tuple(p.callbacks)) for p in plugins]
    if user is not None:
        layers.append(Layer(user, "user code", "train.py", user=True))
    return Stack(layers)


def test_the_topmost_answer_wins_and_none_asks_below() -> None:
    """A layer that returns None leaves the stage to those below."""

    class Low(Base):
        @ptrain.hookimpl
        def count(self, batch: Any) -> dict[str, float]:
            return {"loss": 2 * batch}

    class High(Base):
        @ptrain.hookimpl
        def count(self, batch: Any) -> dict[str, float] | None:
            return {"loss": 100.0} if batch > 10 else None

    run = stack(Low(), High())
    assert run.call("count", run=None, batch=3) == {"loss": 6}
    assert run.call("count", run=None, batch=11) == {"loss": 100.0}


def test_wrappers_and_callbacks_nest_by_layer() -> None:
    """Later layers are outer; a layer's post-callback acts outside its own wrapper, pre-callbacks go bottom-up."""
    seen: list[str] = []

    def plugin(name: str) -> Any:
        class Toy(Base):
            callbacks = (
                ("pre-count", lambda batch: seen.append(f"pre {name}") or {"batch": batch + 1}),
                ("post-count", lambda run, result: seen.append(f"post {name}")),
            )

            @ptrain.hookimpl(wrapper=True)
            def count(self) -> Generator[None, Any, Any]:
                seen.append(f"in {name}")
                result = yield
                seen.append(f"out {name}")
                return {**result, name: 1.0}

        return Toy()

    found = stack(plugin("a"), plugin("b")).call("count", run=None, batch=5)
    assert found == {"loss": 7, "a": 1.0, "b": 1.0}
    assert seen == ["pre a", "pre b", "in b", "in a", "out a", "post a", "out b", "post b"]


def test_an_argument_that_may_be_none_may_be_left_out() -> None:
    """Whoever takes it is given None; one that may not be None is missing."""

    class Optional(Base):
        @ptrain.hookimpl
        def create_engine(self, run: Any, model: Any, optimizer: Any, scheduler: Any = None) -> Any:
            return lambda: (model, optimizer, scheduler)

    layers = stack(Optional())
    assert layers.call("create_engine", run=FakeRun(), model=1, scheduler=3)() == (1, None, 3)
    assert layers.call("create_engine", run=FakeRun(), model=1, optimizer=2)() == (1, 2, None)
    with pytest.raises(KeyError, match="model"):
        layers.call("create_engine", run=FakeRun())


def test_observers_run_bottom_up_and_a_broken_one_is_reported_once() -> None:
    """An observer's exception never stops the run."""
    seen: list[str] = []

    class Broken(Base):
        @ptrain.hookimpl
        def on_step_end(self) -> None:
            raise ValueError("oops")

    class Fine(Base):
        @ptrain.hookimpl
        def on_step_end(self, run: Any, result: Any) -> None:
            seen.append("fine")

    run, layers = FakeRun(), stack(Broken(), Fine())
    for _ in range(3):
        layers.call("on_step_end", run=run, result=None)
    assert seen == ["fine"] * 3
    assert len(run.warned) == 1 and "`on_step_end` of `broken` (toy 1.0)" in run.warned[0] and "oops" in run.warned[0]


def test_wrappers_go_round_stages_of_kind_all_too() -> None:
    """A wrapper of `save_state` sees what all layers returned."""

    class Saves(Base):
        @ptrain.hookimpl
        def save_state(self) -> dict[str, int]:
            return {"a": 1}

    class Watches(Base):
        @ptrain.hookimpl(wrapper=True)
        def save_state(self) -> Generator[None, Any, Any]:
            result = yield
            return [*result, "seen"]

    assert stack(Saves(), Watches()).call("save_state", run=FakeRun()) == [{"a": 1}, "seen"]


def test_a_failure_names_plugin_distribution_stage_and_line() -> None:
    """What a plugin raises is wrapped; the exit code is that of a failed run."""

    class Bad(Base):
        @ptrain.hookimpl
        def count(self, batch: Any) -> dict[str, float]:
            return {"loss": 1 / batch}

    with pytest.raises(PluginError) as caught:
        stack(Bad()).call("count", run=None, batch=0)
    text = str(caught.value)
    assert "`count` of `bad` (toy 1.0) failed in stage `count`: ZeroDivisionError" in text
    assert "test_stack.py:" in text
    assert caught.value.exit_code == 1


def test_a_stage_that_nobody_answers_is_an_error() -> None:
    """`loss` has no default."""
    with pytest.raises(PluginError, match="no layer answers the stage `loss`"):
        stack().call("loss", run=None, batch=1)


WRONG: dict[str, Any] = {
    "create_model": {}, "split": {"train": []}, "count": [1], "step": 0.5, "loss": "low", "forward": [0.0],
    "create_dataloader": 3, "create_engine": "engine", "create_scheduler": object(), "checkpoint": 7, "load": [],
}  # fmt: skip


@pytest.mark.parametrize("stage", WRONG)
def test_a_result_of_the_wrong_kind_is_named(stage: str) -> None:
    """Plugin, distribution, stage, what it returned and what is expected; for an answer, a wrapper and a callback."""
    arguments: dict[str, Any] = dict.fromkeys(list(inspect.signature(STAGES[stage]).parameters)[1:], ())

    def answer(self: Any, run: Any) -> Any:
        return WRONG[stage]

    def wrapper(self: Any, run: Any) -> Generator[None, Any, Any]:
        yield
        return WRONG[stage]

    bad = type("Bad", (Base,), {stage: ptrain.hookimpl(answer)})
    wraps = type("Bad", (Base,), {stage: ptrain.hookimpl(wrapper=True)(wrapper)})
    after = type("Bad", (Base,), {"callbacks": [(f"post-{stage}".replace("_", "-"), lambda run, result: WRONG[stage])]})
    for plugin in (bad, wraps, after):
        with pytest.raises(PluginError) as caught:
            stack(plugin()).call(stage, run=None, **arguments)
        text = str(caught.value)
        assert "of `bad` (toy 1.0) returned " in text and f"expected: the stage `{stage}` to return" in text, text
        assert "test_stack.py:" in text


def test_a_wrapper_that_loses_the_result_is_named() -> None:
    """Otherwise it would seem that nobody answers."""

    class Loses(Base):
        @ptrain.hookimpl(wrapper=True)
        def step(self, run: Any) -> Generator[None, Any, Any]:
            """Returns what it has not got."""
            yield
            return getattr(run, "nothing", None)

    with pytest.raises(
        PluginError, match=r"`step` of `loses` \(toy 1.0\) returned None: the result of the layers below"
    ):
        stack(Loses()).call("step", run=None, batches=[])


def _no_return() -> type:
    class Bad(Base):
        @ptrain.hookimpl
        def loss(self, run: Any, batch: Any) -> Any:
            batch + 1

    return Bad


def _lost_result() -> type:
    class Bad(Base):
        @ptrain.hookimpl(wrapper=True)
        def loss(self) -> Any:
            yield

    return Bad


def _unmarked() -> type:
    class Parent(Base):
        @ptrain.hookimpl
        def loss(self) -> Any:
            return 1

    class Bad(Parent):
        def loss(self) -> Any:
            return 2

    return Bad


def _unknown_hook() -> type:
    class Bad(Base):
        @ptrain.hookimpl
        def los(self) -> Any:
            return 1

    return Bad


def _unknown_argument() -> type:
    class Bad(Base):
        @ptrain.hookimpl
        def loss(self, run: Any, bacth: Any) -> Any:
            return 1

    return Bad


def _tryfirst() -> type:
    class Bad(Base):
        @ptrain.hookimpl(tryfirst=True)
        def loss(self) -> Any:
            return 1

    return Bad


def _event() -> type:
    class Bad(Base):
        callbacks = (("pre-los", lambda run: None),)

    return Bad


def _event_argument() -> type:
    class Bad(Base):
        callbacks = (("pre-loss", lambda run, labels: None),)

    return Bad


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_no_return, "can never return a value"),
        (_lost_result, "can never return a value"),
        (_unmarked, "has no `@ptrain.hookimpl`"),
        (_unknown_hook, "call it `loss`"),
        (_unknown_argument, "stage `loss` has no argument `bacth`"),
        (_tryfirst, "asks for tryfirst"),
        (_event, "write `pre-loss`"),
        (_event_argument, "has no argument `labels`"),
    ],
)
def test_mistakes_are_refused_by_name(make: Callable[[], type], says: str) -> None:
    """Each would otherwise be silent: the message names plugin, distribution, file and line."""
    with pytest.raises(PluginError) as caught:
        stack(make()())
    text = str(caught.value)
    assert says in text and "`bad` (toy 1.0)" in text and "test_stack.py:" in text
    assert caught.value.exit_code == 2


def test_a_pre_callback_may_only_replace_arguments() -> None:
    """Anything else it returns is an error that lists the arguments."""

    class Bad(Base):
        callbacks = (("pre-count", lambda batch: {"nonsense": 1}),)

    with pytest.raises(PluginError, match="new values for: batch"):
        stack(Bad()).call("count", run=None, batch=1)


def test_only_one_plugin_replaces_step_but_user_code_may() -> None:
    """Two features that replace `step` conflict; the user's own code stands above them."""

    def replacing(name: str) -> Any:
        @ptrain.hookimpl
        def step(self: Any, batches: Any) -> StepResult:
            return StepResult(-1.0)

        return type(name, (Base,), {"step": step})()

    with pytest.raises(PluginError, match="`one` and `two` both replace the stage `step`"):
        stack(replacing("One"), replacing("Two"))
    module = types.ModuleType("train")
    module.step = ptrain.hookimpl(lambda batches: StepResult(-2.0))  # type: ignore[attr-defined]
    assert stack(replacing("One"), user=module).call("step", run=None, batches=[]).loss == -2.0


def test_state_is_asked_for_by_name() -> None:
    """What fails in `save_state` or `load_state` is named; a state is given to its own layer alone."""
    given: list[Any] = []

    class Keeper(Base):
        @ptrain.hookimpl
        def save_state(self) -> dict[str, int]:
            raise ZeroDivisionError("no state")

        @ptrain.hookimpl
        def load_state(self, state: Any) -> None:
            given.append(state)
            if state is None:
                raise ZeroDivisionError("no state")

    one = stack(Keeper())
    with pytest.raises(PluginError, match=r"`save_state` of `keeper` \(toy 1.0\) failed.*ZeroDivisionError"):
        one.collect("save_state", run=None)
    one.tell("load_state", "keeper", run=None, state=1)
    one.tell("load_state", "other", run=None, state=2)
    assert given == [1]
    with pytest.raises(PluginError, match=r"`load_state` of `keeper` \(toy 1.0\) failed.*ZeroDivisionError"):
        one.tell("load_state", "keeper", run=None, state=None)


def test_what_core_itself_raises_has_its_own_cause() -> None:
    """Not itself: whoever follows the causes to the first one would never end."""
    first = OSError("disk")

    class Broken(Core):
        @ptrain.hookimpl
        def count(self, run: Any, batch: Any) -> dict[str, float]:
            raise ValueError("core") from first

    with pytest.raises(ValueError, match="core") as caught:
        Stack([Layer(Broken(), "core", "ptrain-core 0")]).call("count", run=None, batch=1)
    assert caught.value.__cause__ is first


def test_ordinary_names_in_user_code_are_left_alone() -> None:
    """In a user's module `load` and `split` mean nothing unless they take `run` and were forgotten to be marked."""
    module = types.ModuleType("train")
    exec("def load(path):\n    return path\n", module.__dict__)
    stack(user=module)
    exec("def loss(run, batch):\n    return 1\n", module.__dict__)
    with pytest.raises(PluginError, match=r"no `@ptrain\.hookimpl`"):
        stack(user=module)


def test_every_stage_has_a_kind_and_a_promise() -> None:
    """The page of hooks says of each stage which kind it is."""
    for name, stage in STAGES.items():
        assert "Kind: first" in (stage.__doc__ or "") or "Kind: all" in (stage.__doc__ or ""), name
