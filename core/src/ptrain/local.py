"""The user's own code: a plain Python file that is the top layer of a run's plugins (`--code train.py`).

It runs only when it was asked for: with `--code`, or with `code:` in the recipe and `--allow-code`. In Python, what
the caller's own file (or notebook) defines can take its place: see `caller_code`.
"""

from __future__ import annotations

import contextvars
import hashlib
import importlib.util
import inspect
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from ptrain import hooks
from ptrain.catalog import Offer
from ptrain.errors import PluginError, Position, RecipeError

C = TypeVar("C", bound=type)


_registered: contextvars.ContextVar[list[tuple[str, str, type]] | None] = contextvars.ContextVar(
    "registered", default=None
)
"""What `register` marks while a file runs."""
_of_caller: dict[tuple[str, str], type] = {}
"""What it marks otherwise: the newest class of each kind and name, for recipes that are loaded in this process."""
CALLER = "your code"
UNKNOWN = uuid.uuid4().hex
"""In place of code whose text can't be had."""
_loaded_before: set[str] = set()
"""Modules that user code brought in: they are read anew for the next recipe."""


@dataclass(frozen=True)
class UserCode:
    """The user's code, as it ran.

    Attributes:
        path: the file; None for what the caller of `ptrain.train` gave as `plugins`.
        module: the imported module.
        text: what stood in the file; kept with the run.
        sha256: of that text.
        classes: what it registered.
    """

    path: Path | None
    module: ModuleType
    text: str
    sha256: str
    classes: Mapping[Offer, type]


def register(kind: str, name: str) -> Callable[[C], C]:
    """Make a class of your own code known to the recipe as `name`; use it as a decorator.

        @ptrain.register("trainer", "my_custom_trainer")
        class MyTrainer(SFT): ...

    In a file that a recipe names (or `--code`) it counts for that recipe alone; in a script or notebook for every
    recipe that is loaded there afterwards. A class that is defined again takes the place of the former.

    Raises:
        PluginError: there is no such kind, or the name is no plain text.
    """
    from ptrain.parts import KINDS

    if kind not in KINDS:
        raise PluginError(f"there is no kind `{kind}`", expected="one of " + ", ".join(f"`{k}`" for k in KINDS))
    if not name or ":" in name:
        raise PluginError(f"`{name}` can't be the name of a {kind}", expected="text without `:`")

    def mark(cls: C) -> C:
        if (found := _registered.get()) is not None:
            found.append((kind, name, cls))
        else:
            _of_caller[kind, name] = cls
        return cls

    return mark


def caller_classes() -> dict[Offer, type]:
    """What this process itself registered, outside of any file of user code."""
    return {
        Offer(kind, name, CALLER, _digest(_source(cls))[:12], f"{cls.__module__}:{cls.__qualname__}"): cls
        for (kind, name), cls in _of_caller.items()
    }


def caller_code(plugins: Sequence[Any]) -> UserCode | None:
    """The top layer of a run that Python starts: functions marked with `hookimpl` or `callback`, or modules of them.

    Raises:
        PluginError: something else is among them.
    """
    module = ModuleType(CALLER)
    texts = []
    for plugin in plugins:
        marked = [plugin] if isinstance(plugin, FunctionType) else _marked(plugin)
        if not marked or not all(_is_marked(function) for function in marked):
            raise PluginError(
                f"`{getattr(plugin, '__name__', plugin)}` in `plugins` is no plugin",
                expected="a function marked with `@ptrain.hookimpl` or `@ptrain.callback`, or a module of such",
                fix="mark it; name a class for the recipe with `@ptrain.register(kind, name)`, and leave it out here",
            )
        for function in marked:
            if hasattr(module, function.__name__):
                raise PluginError(f"two of `plugins` are called `{function.__name__}`", fix="rename one of them")
            setattr(module, function.__name__, function)
        texts.append(_source(plugin))
    text = "\n\n".join(texts)
    return UserCode(None, module, text, _digest(text), {}) if plugins else None


def _marked(plugin: Any) -> list[FunctionType]:
    members = vars(plugin).values() if isinstance(plugin, ModuleType) else ()
    return [value for value in members if isinstance(value, FunctionType) and _is_marked(value)]


def _is_marked(function: Any) -> bool:
    return hasattr(function, "ptrain_impl") or hasattr(function, hooks.CALLBACK)


def _source(thing: Any) -> str:
    """The text of a function, class or module, with the file that it stands in: what else there is may be used by it.

    Where no text can be had, something that no other process has: what it does is not known to be the same.
    """
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError):
        return f"{UNKNOWN} {id(thing)}"
    file = getattr(sys.modules.get(getattr(thing, "__module__", "") or ""), "__file__", None)
    return text if file is None else f"{text}\n{Path(file).read_text(encoding='utf-8')}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_code(path: Path) -> UserCode:
    """Run the file and return what it holds.

    It is a module under its own name, and its folder is on `sys.path`, so that it may import its siblings.

    Raises:
        RecipeError: there is no such file, or its name is taken by another module.
        PluginError: it fails while it runs; with file and line.
    """
    path = path.expanduser().resolve()
    text = _text_of(path)
    digest = _digest(text)
    for name in _loaded_before & set(sys.modules):
        del sys.modules[name]
    _loaded_before.clear()
    taken = sys.modules.get(path.stem)
    if taken is not None and getattr(taken, "__file__", None) != str(path):
        raise RecipeError(
            f"the file `{path.name}` can't be imported: the module `{path.stem}` is there already",
            where=Position(str(path)), fix="give the file another name",
        )  # fmt: skip
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    registered: list[tuple[str, str, type]] = []
    module = _run(path, registered)
    offers = {
        Offer(kind, name, path.name, digest[:12], f"{cls.__module__}:{cls.__qualname__}"): cls
        for kind, name, cls in registered
    }
    names = [(kind, name) for kind, name, _ in registered]
    if twice := next((one for one in names if names.count(one) > 1), None):
        raise PluginError(f"{path.name} registers the {twice[0]} `{twice[1]}` twice", where=Position(str(path)))
    return UserCode(path, module, text, digest, offers)


def _text_of(path: Path) -> str:
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise RecipeError(f"`{path}` is no Python module", expected="a file like `train.py`")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no code `{path}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the code `{path}` can't be read: {error}") from None


def _run(path: Path, registered: list[tuple[str, str, type]]) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"`{path}` is no Python module", expected="a file like `train.py`")
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[path.stem] = module
    token = _registered.set(registered)
    try:
        spec.loader.exec_module(module)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # the code may fail in any way
        sys.modules.pop(path.stem, None)
        raise _failure(path, error) from error
    finally:
        _registered.reset(token)
        _loaded_before.update(_own_modules(path.parent, set(sys.modules) - before))
        _loaded_before.add(path.stem)
    return module


def _own_modules(folder: Path, names: set[str]) -> set[str]:
    """Those of `names` that were found in `folder` itself (an environment may lie deeper in it)."""
    own = set()
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        top = name.partition(".")[0]
        if file and Path(file).is_relative_to(folder):
            own |= {name} if Path(file).relative_to(folder).parts[0] in (top, f"{top}.py") else set()
    return own


def _failure(path: Path, error: BaseException) -> PluginError:
    where = Position(str(path))
    if isinstance(error, SyntaxError):
        where = Position(error.filename or str(path), error.lineno or 0, error.offset or 1)
        cause = f"SyntaxError: {error.msg}"
    else:
        cause = f"{type(error).__name__}: {error}"
        frames = traceback.extract_tb(error.__traceback__)
        if own := [frame for frame in frames if Path(frame.filename).parent == path.parent]:
            where = Position(own[-1].filename, own[-1].lineno or 0, 1)
    return PluginError(f"the code `{path.name}` fails: {cause}", where=where)
