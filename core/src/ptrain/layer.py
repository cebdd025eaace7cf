"""One layer of a stack, and the mistakes that are found when it is loaded."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ptrain import hooks
from ptrain.errors import PluginError, Position

STAGES: dict[str, Callable[..., Any]] = {
    name: function for name, function in vars(hooks).items() if hasattr(function, "ptrain_spec")
}
ALL = frozenset(name for name, f in STAGES.items() if not getattr(f, "ptrain_spec")["firstresult"])  # noqa: B009
EXCLUSIVE = frozenset({"step", "loss", "create_engine", "evaluate"})
"""Stages that one plugin at most replaces; others wrap them."""


@dataclass(frozen=True)
class Layer:
    """One layer of the stack.

    Attributes:
        plugin: the trainer or feature instance, or a module.
        name: what the recipe calls it.
        origin: the distribution and version, or the file of user code.
        callbacks: `(event, function)` pairs.
        user: whether it is the user's own code.
    """

    plugin: Any
    name: str
    origin: str
    callbacks: Sequence[tuple[str, Callable[..., Any]]] = ()
    user: bool = False


def promise(stage: str) -> str:
    """What a stage returns, in the words of its hook."""
    doc = (STAGES[stage].__doc__ or "").strip().split(". ")[0]
    return doc.removeprefix("Return ").replace("\n", " ")


def optional(stage: str) -> dict[str, None]:
    """The arguments that a call of `stage` may leave out, as they are then: those that may be None."""
    parameters = inspect.signature(STAGES[stage]).parameters.values()
    return {one.name: None for one in parameters if str(one.annotation).endswith("| None")}


def check_layer(layer: Layer) -> None:
    """Raise PluginError for every mistake that would otherwise stay silent.

    Found: a hook or argument that does not exist, a method named like a stage without `@hookimpl` (it would
    un-register the hook), an implementation that can never return a value, `tryfirst` and `trylast`.
    """
    for name in dir(layer.plugin):
        if name.startswith("__") or isinstance(inspect.getattr_static(layer.plugin, name), property):
            continue
        function = getattr(layer.plugin, name)
        options = getattr(function, "ptrain_impl", None)
        if options is not None:
            _check_implementation(layer, name, function, options)
        elif _forgot_marker(layer, name, function):
            raise _complaint(
                layer, function, f"`{name}` is named like a stage but has no `@ptrain.hookimpl`",
                fix="mark it with `@ptrain.hookimpl`, or give it another name",
            )  # fmt: skip


def _forgot_marker(layer: Layer, name: str, function: Any) -> bool:
    if name not in STAGES or not callable(function):
        return False
    if not isinstance(layer.plugin, ModuleType):
        return True
    # `load`, `split` and `loss` are ordinary names in a user's module: only what takes `run` is meant.
    defined_here = getattr(function, "__module__", None) == layer.plugin.__name__
    return defined_here and next(iter(inspect.signature(function).parameters), None) == "run"


def _check_implementation(layer: Layer, name: str, function: Any, options: Mapping[str, Any]) -> None:
    if name not in STAGES:
        close = difflib.get_close_matches(name, STAGES, n=1)
        raise _complaint(
            layer, function, f"there is no stage `{name}`",
            expected="one of " + ", ".join(STAGES),
            fix=f"call it `{close[0]}`" if close else None,
        )  # fmt: skip
    offered = list(inspect.signature(STAGES[name]).parameters)
    wanted = [p for p in inspect.signature(function).parameters if p != "self"]
    unknown = [argument for argument in wanted if argument not in offered]
    if unknown:
        raise _complaint(
            layer, function, f"stage `{name}` has no argument `{unknown[0]}`",
            expected="some of " + ", ".join(offered),
        )  # fmt: skip
    for option in ("tryfirst", "trylast", "hookwrapper"):
        if options.get(option):
            raise _complaint(
                layer, function, f"`{name}` asks for {option}",
                expected="the order of the layers alone to decide", fix="use `@ptrain.hookimpl(wrapper=True)`",
            )  # fmt: skip
    if name not in ALL and not _can_return(function):
        raise _complaint(
            layer, function, f"`{name}` can never return a value",
            expected=f"it to return {promise(name)}", fix="add the `return`",
        )  # fmt: skip


def _can_return(function: Any) -> bool:
    """Whether some path of `function` returns a value or raises; True where its source is not to be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return True
    top = tree.body[0]
    if not isinstance(top, ast.FunctionDef):
        return True
    nested = {id(n) for f in ast.walk(top) if f is not top and isinstance(f, _SCOPES) for n in ast.walk(f)}
    own = [node for node in ast.walk(top) if id(node) not in nested]
    returns = any(isinstance(n, ast.Return) and n.value is not None and not _is_none(n.value) for n in own)
    return returns or isinstance(top.body[-1], ast.Raise)


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def check_callback(layer: Layer, event: str, callback: Any) -> tuple[str, str]:
    """`("pre" or "post", stage)` of a callback; PluginError for an unknown event or argument."""
    when, _, rest = event.partition("-")
    stage = rest.replace("-", "_")
    if when not in ("pre", "post") or stage not in STAGES:
        events = [f"{w}-{s}" for s in STAGES for w in ("pre", "post")]
        close = difflib.get_close_matches(event, events, n=1)
        raise _complaint(
            layer, callback, f"there is no event `{event}`",
            expected="`pre-` or `post-` and one of " + ", ".join(STAGES),
            fix=f"write `{close[0]}`" if close else None,
        )  # fmt: skip
    offered = list(inspect.signature(STAGES[stage]).parameters) if when == "pre" else ["run", "result"]
    names = list(inspect.signature(callback).parameters)
    unknown = [name for name in names if name not in offered]
    if when == "pre" and unknown:
        raise _complaint(
            layer, callback, f"the callback `{event}` has no argument `{unknown[0]}`",
            expected="some of " + ", ".join(offered),
        )  # fmt: skip
    if when == "post" and len(names) != 2:
        raise _complaint(
            layer, callback, f"the callback `{event}` takes {len(names)} arguments",
            expected="two: `run` and the result of the stage",
        )  # fmt: skip
    return when, stage


def refuse_second_replacement(layer: Layer, replaced: dict[str, str]) -> None:
    for stage in EXCLUSIVE:
        function = getattr(layer.plugin, stage, None)
        options = getattr(function, "ptrain_impl", None)
        if options is None or options.get("wrapper"):
            continue
        if stage in replaced:
            raise _complaint(
                layer, function, f"`{replaced[stage]}` and `{layer.name}` both replace the stage `{stage}`",
                expected="at most one replacement above core's", fix="wrap it: `@ptrain.hookimpl(wrapper=True)`",
            )  # fmt: skip
        replaced[stage] = layer.name


def _complaint(layer: Layer, function: Any, message: str, **more: str | None) -> PluginError:
    return PluginError(f"plugin `{layer.name}` ({layer.origin}): {message}", where=place_of(function), **more)


def place_of(function: Any) -> Position | None:
    """The file and line in which a function begins."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return Position(code.co_filename, code.co_firstlineno, 1) if code is not None else None
