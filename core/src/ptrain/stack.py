"""The stack of one run: its layers in order, and how a stage is called."""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NoReturn

import pluggy

from ptrain import hooks
from ptrain.errors import PluginError, Position, PtrainError
from ptrain.layer import (
    ALL,
    STAGES,
    Layer,
    check_callback,
    check_layer,
    optional,
    place_of,
    promise,
    refuse_second_replacement,
)
from ptrain.promises import fits, said

MAY_FAIL_THE_RUN = frozenset({"configure", "before_training", "save_state", "load_state"})
CALLED_AFTER = "ptrain_called_after"
"""The attribute of a post-callback's own plugin that says which it is."""


@dataclass
class Stack:
    """The layers of one run, bottom-up, in a pluggy manager of their own."""

    layers: Sequence[Layer]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _pre: dict[str, list[tuple[Layer, Callable[..., Any]]]] = field(default_factory=lambda: defaultdict(list))
    _code: dict[Any, tuple[Layer, str]] = field(default_factory=dict)
    _reported: set[int] = field(default_factory=set)
    _found: dict[str, tuple[list[Any], list[Any]]] = field(default_factory=dict)
    _optional: dict[str, dict[str, None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._manager = pluggy.PluginManager("ptrain")
        self._manager.add_hookspecs(hooks)
        replaced: dict[str, str] = {}
        for depth, layer in enumerate(self.layers):
            check_layer(layer)
            self._note_code(layer)
            self._manager.register(layer.plugin, name=f"{depth}:{layer.name}")
            self._add_callbacks(layer, depth)
            if depth and not layer.user:
                refuse_second_replacement(layer, replaced)

    def call(self, stage: str, **arguments: Any) -> Any:
        """The result of `stage`: the topmost answer, or None for a stage of kind "all".

        Pre-callbacks come first, lower layers first; then the implementations within their wrappers.

        Raises:
            PluginError: nobody answers, or an answer is of the wrong type; what a plugin raised is wrapped
                in one that names plugin, distribution, stage, file and line.
        """
        start = time.perf_counter()
        if stage not in self._optional:
            self._optional[stage] = optional(stage)
        arguments = {**self._optional[stage], **arguments}
        try:
            for layer, callback in self._pre[stage]:
                arguments = _replaced(stage, layer, callback, arguments)
            result = self._call_all(stage, arguments) if stage in ALL else self._call_first(stage, arguments)
        except PtrainError:
            raise
        except Exception as error:
            self._raise(stage, error)
        finally:
            self.seconds[stage] += time.perf_counter() - start
        return result

    def wrapped(self, stage: str, result: Any, **arguments: Any) -> Any:
        """`result` as the wrappers and post-callbacks of the "first" stage `stage` make it; nobody is asked for one.

        Raises:
            PluginError: as from `call`.
        """
        arguments = {**optional(stage), **arguments}
        checked = lambda impl, value: self._checked(stage, impl, value)  # noqa: E731
        try:
            return _within(self._impls(stage)[0], arguments, lambda: result, checked)
        except PtrainError:
            raise
        except Exception as error:
            self._raise(stage, error)

    def collect(self, stage: str, **arguments: Any) -> list[tuple[str, Any]]:
        """`(layer name, result)` of each layer that implements the "all" stage `stage`, bottom-up.

        Raises:
            PluginError: one fails; names plugin, distribution, stage, file and line.
        """
        return [(impl.plugin_name.split(":", 1)[1], self._asked(stage, impl, arguments)) for impl in self._plain(stage)]

    def tell(self, stage: str, layer: str, **arguments: Any) -> None:
        """Call what one layer alone implements of the "all" stage `stage`.

        Raises:
            PluginError: it fails; names plugin, distribution, stage, file and line.
        """
        for impl in self._plain(stage):
            if impl.plugin_name.split(":", 1)[1] == layer:
                self._asked(stage, impl, arguments)

    def _asked(self, stage: str, impl: Any, arguments: Mapping[str, Any]) -> Any:
        try:
            return impl.function(*_pick(impl, arguments))
        except PtrainError:
            raise
        except Exception as error:
            self._raise(stage, error)

    def _raise(self, stage: str, error: Exception) -> NoReturn:
        blamed = self._blame(stage, error)
        # An error that were its own cause would be followed for ever by whoever looks for the first one.
        raise blamed from (error.__cause__ if blamed is error else error)

    def implementers(self, stage: str) -> list[str]:
        """Names of the layers that implement `stage`, bottom-up."""
        return [impl.plugin_name.split(":", 1)[1] for impl in self._plain(stage)]

    def order(self, stage: str) -> list[tuple[Layer, str, Callable[..., Any]]]:
        """What acts at `stage`, first what begins first: `(layer, role, function)`.

        The roles are "pre-..." and "post-..." (callbacks), "wraps" and "answers"; of several answers to a stage of
        kind "first", each is asked where the one before returns None.
        """
        found = [(layer, f"pre-{stage}".replace("_", "-"), callback) for layer, callback in self._pre[stage]]
        impls = getattr(self._manager.hook, stage).get_hookimpls()
        plain = self._plain(stage)
        for impl in [*reversed([impl for impl in impls if impl.wrapper]), *(plain if stage in ALL else plain[::-1])]:
            layer = self.layers[int(impl.plugin_name.partition(":")[0])]
            callback = getattr(impl.plugin, CALLED_AFTER, None)
            role = "wraps" if impl.wrapper else "answers"
            found.append((layer, role, impl.function) if callback is None else (layer, *callback))
        return found

    def changes(self, stage: str) -> bool:
        """Whether anything but core implements `stage`, wraps it, or is called before or after it."""
        return bool(self._pre[stage]) or len(getattr(self._manager.hook, stage).get_hookimpls()) > 1

    def _plain(self, stage: str) -> list[Any]:
        return self._impls(stage)[1]

    def _impls(self, stage: str) -> tuple[list[Any], list[Any]]:
        """The wrappers of a stage, and what answers it, bottom-up; no layer is added once there is a stack."""
        if stage not in self._found:
            impls = getattr(self._manager.hook, stage).get_hookimpls()
            self._found[stage] = [i for i in impls if i.wrapper], [i for i in impls if not i.wrapper]
        return self._found[stage]

    def _checked(self, stage: str, impl: Any, result: Any) -> Any:
        """`result`, if it is of the kind that the stage promises.

        Raises:
            PluginError: it is not, or a wrapper has lost it; with plugin, distribution, stage, and both.
        """
        if fits(stage, result):
            return result
        layer = self.layers[int(impl.plugin_name.partition(":")[0])]
        event, function = getattr(impl.plugin, CALLED_AFTER, (stage, impl.function))
        what = "None: the result of the layers below is lost" if result is None else said(result)
        raise PluginError(
            f"`{event}` of `{layer.name}` ({layer.origin}) returned {what}",
            where=place_of(function), expected=f"the stage `{stage}` to return {promise(stage)}",
        )  # fmt: skip

    def _call_first(self, stage: str, arguments: dict[str, Any]) -> Any:
        wrappers, plain = self._impls(stage)

        def inner() -> Any:
            for impl in reversed(plain):
                result = impl.function(*_pick(impl, arguments))
                if result is not None:
                    return self._checked(stage, impl, result)
            return None

        result = _within(wrappers, arguments, inner, lambda impl, value: self._checked(stage, impl, value))
        if result is None:
            layers = ", ".join(f"`{layer.name}`" for layer in self.layers[1:]) or "core alone"
            raise PluginError(
                f"no layer answers the stage `{stage}` (layers: {layers})",
                expected=f"an implementation that returns {promise(stage)}",
            )
        return result

    def _call_all(self, stage: str, arguments: dict[str, Any]) -> None:
        wrappers, plain = self._impls(stage)

        def inner() -> list[Any]:
            return [result for impl in plain if (result := self._one(stage, impl, arguments))]

        return _within(wrappers, arguments, inner)

    def _one(self, stage: str, impl: Any, arguments: dict[str, Any]) -> Any:
        try:
            return impl.function(*_pick(impl, arguments))
        except Exception as error:
            if stage in MAY_FAIL_THE_RUN or isinstance(error, PtrainError):
                raise
            if id(impl) not in self._reported:
                self._reported.add(id(impl))
                arguments["run"].warn(f"{self._blame(stage, error, always=True)}; the run goes on without it")
            return None

    def _add_callbacks(self, layer: Layer, depth: int) -> None:
        for number, (event, callback) in enumerate(layer.callbacks):
            when, stage = check_callback(layer, event, callback)
            code = getattr(callback, "__code__", None)
            if code is not None:
                self._code[code] = (layer, event)
            if when == "pre":
                self._pre[stage].append((layer, callback))
            else:
                self._manager.register(_post(stage, event, callback), name=f"{depth}:{layer.name}:{event}:{number}")

    def note_part(self, part: type, name: str, origin: str) -> None:
        """Name this class of part, which is no layer, where its own code fails."""
        layer = Layer(part, name, origin)
        for cls in part.__mro__:
            if cls is not object and not cls.__module__.startswith("ptrain."):
                found = {f.__code__: (layer, name) for name, f in vars(cls).items() if inspect.isfunction(f)}
                self._code.update(found)

    def _note_code(self, layer: Layer) -> None:
        for name in STAGES:
            function = getattr(layer.plugin, name, None)
            code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
            if code is not None:
                self._code[code] = (layer, name)

    def _blame(self, stage: str, error: Exception, always: bool = False) -> Exception:
        """The error to show: `error` itself where core failed, else one that names the plugin."""
        blamed, trace = None, error.__traceback__
        while trace is not None:
            found = self._code.get(trace.tb_frame.f_code)
            if found is not None and (always or found[0] is not self.layers[0]):
                blamed = (*found, Position(trace.tb_frame.f_code.co_filename, trace.tb_lineno, 1))
            trace = trace.tb_next
        if blamed is None:
            return error
        layer, what, where = blamed
        wrapped = PluginError(
            f"`{what}` of `{layer.name}` ({layer.origin}) failed in stage `{stage}`: {type(error).__name__}: {error}",
            where=where,
        )
        wrapped.exit_code = 1
        return wrapped


def _post(stage: str, event: str, callback: Callable[..., Any]) -> object:
    """A plugin whose only hook is a wrapper of `stage` that gives the result to `callback`."""

    def wrapper(run: Any) -> Any:
        result = yield
        changed = callback(run, result)
        return result if changed is None else changed

    holder = ModuleType(f"post_{stage}")
    setattr(holder, stage, hooks.hookimpl(wrapper=True)(wrapper))
    setattr(holder, CALLED_AFTER, (event, callback))
    return holder


def _pick(impl: Any, arguments: Mapping[str, Any]) -> list[Any]:
    # pluggy itself passes nothing to what has a default, which is there for plain calls (`ptrain.stages`).
    return [arguments[name] for name in (*impl.argnames, *impl.kwargnames)]


def _within(
    wrappers: Sequence[Any],
    arguments: Mapping[str, Any],
    inner: Callable[[], Any],
    checked: Callable[[Any, Any], Any] = lambda impl, result: result,
) -> Any:
    """`inner()` inside generator wrappers, the last one outermost (pluggy would not say which returned what).

    Args:
        checked: given a wrapper and its result, unless nothing came from below either.
    """
    if not wrappers:
        return inner()
    generator, below = wrappers[-1].function(*_pick(wrappers[-1], arguments)), None
    next(generator)
    try:
        try:
            result = _within(wrappers[:-1], arguments, inner, checked)
        except BaseException as error:
            generator.throw(error)
        else:
            below = result
            generator.send(result)
    except StopIteration as stop:
        return stop.value if below is None and stop.value is None else checked(wrappers[-1], stop.value)
    raise PluginError(f"the wrapper `{wrappers[-1].function.__qualname__}` yields more than once")


def _replaced(stage: str, layer: Layer, callback: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(callback).parameters)
    changed = callback(**{name: arguments[name] for name in names})
    if changed is None:
        return arguments
    if not isinstance(changed, Mapping) or not set(changed) <= set(arguments) - {"run"}:
        raise PluginError(
            f"the callback `pre-{stage}` of `{layer.name}` ({layer.origin}) returned {type(changed).__name__}",
            expected="None, or a mapping with new values for: " + ", ".join(sorted(set(arguments) - {"run"})),
        )
    return {**arguments, **changed}
