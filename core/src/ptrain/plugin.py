"""The stack of one run: its layers, the checks that each passes when it is loaded, and how a stage is called."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from types import ModuleType
from typing import Any, NoReturn

import pluggy

from ptrain import hooks
from ptrain.errors import PluginError, Position, PtrainError
from ptrain.results import Loss

STAGES: dict[str, Callable[..., Any]] = {
    name: function for name, function in vars(hooks).items() if hasattr(function, "ptrain_spec")
}
ALL = frozenset(name for name, f in STAGES.items() if not getattr(f, "ptrain_spec")["firstresult"])  # noqa: B009
MAY_FAIL_THE_RUN = frozenset({"configure", "before_training", "save_state", "load_state"})
CALLED_AFTER = "ptrain_called_after"
"""The attribute of a post-callback's own plugin that says which it is."""
EXCLUSIVE = frozenset({"step", "loss", "create_engine", "evaluate"})


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


@dataclass
class Stack:
    """The layers of one run, bottom-up, in a pluggy manager of their own."""

    layers: Sequence[Layer]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _pre: dict[str, list[tuple[Layer, Callable[..., Any]]]] = field(default_factory=lambda: defaultdict(list))
    _code: dict[Any, tuple[Layer, str]] = field(default_factory=dict)
    _reported: set[int] = field(default_factory=set)
    _found: dict[str, tuple[list[Any], list[Any]]] = field(default_factory=dict)

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
                _refuse_second_replacement(layer, replaced)

    def call(self, stage: str, **arguments: Any) -> Any:
        """The result of `stage`: the topmost answer, or None for a stage of kind "all".

        Pre-callbacks come first, lower layers first; then the implementations within their wrappers.

        Raises:
            PluginError: nobody answers, or an answer is of the wrong type; what a plugin raised is wrapped
                in one that names plugin, distribution, stage, file and line.
        """
        start = time.perf_counter()
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
        what = "None: the result of the layers below is lost" if result is None else _said(result)
        raise PluginError(
            f"`{event}` of `{layer.name}` ({layer.origin}) returned {what}",
            where=_place(function), expected=f"the stage `{stage}` to return {_promise(stage)}",
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
                expected=f"an implementation that returns {_promise(stage)}",
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
    return [arguments[name] for name in impl.argnames]


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


def fits(stage: str, result: Any) -> bool:
    """Whether `result` is of the kind that a stage of the kind "first" promises; classes go by name, not by import."""
    wanted = RETURNS.get(stage)
    if callable(wanted):
        return bool(wanted(result))
    return wanted is None or any(cls.__name__ in wanted for cls in type(result).__mro__)


def _is_loss(result: Any) -> bool:
    return isinstance(result, Loss) or getattr(result, "ndim", None) == 0  # a scalar: the mean over samples


def _said(result: Any) -> str:
    """A result in a few words: its class, and the shape of a tensor or the keys of a mapping."""
    if hasattr(result, "shape"):
        return f"{type(result).__name__} {list(result.shape)}"
    keys = f" with the keys {list(result)[:5]}" if isinstance(result, Mapping) else ""
    return f"{type(result).__name__}{keys}"


RETURNS: Mapping[str, tuple[str, ...] | Callable[[Any], bool]] = {
    "create_tokenizer": callable,
    "load": ("Dataset",),
    "split": lambda result: isinstance(result, Mapping) and {"train", "eval"} <= set(result),
    "process": ("Dataset",),
    "create_dataloader": lambda result: hasattr(result, "__iter__"),
    "create_config": ("PretrainedConfig", "PreTrainedConfig"),
    "create_model": ("Module",),
    "create_optimizer": ("Optimizer",),
    "create_scheduler": lambda result: hasattr(result, "get_last_lr") and hasattr(result, "step"),
    "create_engine": callable,
    "count": lambda result: isinstance(result, Mapping),
    "forward": ("Tensor",),
    "token_logprobs": ("Tensor",),
    "sequence_sum": ("Tensor",),
    "step": ("StepResult",),
    "loss": _is_loss,
    "evaluate": lambda result: isinstance(result, Mapping),
    "checkpoint": lambda result: isinstance(result, PathLike),
}
"""What the result of a stage is told by: the name of its class or of a base of it, or a test."""


def _promise(stage: str) -> str:
    doc = (STAGES[stage].__doc__ or "").strip().split(". ")[0]
    return doc.removeprefix("Return ").replace("\n", " ")


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
            expected=f"it to return {_promise(name)}", fix="add the `return`",
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


def _refuse_second_replacement(layer: Layer, replaced: dict[str, str]) -> None:
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
    return PluginError(f"plugin `{layer.name}` ({layer.origin}): {message}", where=_place(function), **more)


def _place(function: Any) -> Position | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return Position(code.co_filename, code.co_firstlineno, 1) if code is not None else None
