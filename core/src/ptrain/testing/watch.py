"""A run that is prepared and trained in one process, and watched: which keys are read, what a plugin remembers.

This changes classes for as long as the process lasts, which is made for it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.testing import runs
from ptrain.testing.recipes import merged

if TYPE_CHECKING:
    from ptrain.run import Run

FILE = "watched.json"
MACHINERY = ("pydantic", "ptrain.recipe", "ptrain.testing", "ptrain.account", "ptrain.portrait", "copy")
"""Modules that read every key, whatever it is."""


def watch(recipe: Mapping[str, Any], folder: Path, kind: str, name: str) -> None:
    """Prepare a recipe that is in no cache, train it in the same process, and write what was seen to `FILE`.

    That is an object with: `read`, the keys that were read by class; `lost`, attributes of the plugin that preparation
    changes, and training reads as they were at the beginning; `logits`, the functions of torch that made some in `loss`
    but outside of `token_logprobs`.

    Raises:
        PtrainError: what a real run would show.
    """
    from ptrain import loop
    from ptrain.catalog import Catalog
    from ptrain.job import observed, open_spec

    catalog = Catalog.installed()
    read = watch_reads()
    memory = Memory(catalog.load(catalog.find(kind, name)))
    spec = runs.prepare(merged(recipe, {"data": {"cache_dir": str(folder.with_name(f"{folder.name}-cache"))}}), folder)
    memory.training = True
    run = open_spec(spec)
    logits = watch_logits(run)
    with observed(run):
        loop.train(run)
    found = {"read": {key: sorted(names) for key, names in read.items()}, "lost": memory.lost(), "logits": logits}
    (folder / FILE).write_text(json.dumps(found), encoding="utf-8")


def watch_reads() -> dict[str, set[str]]:
    """From now on, the keys of sections that are read by anything but `MACHINERY`, by class."""
    from ptrain.recipe.config import Config

    read: dict[str, set[str]] = defaultdict(set)
    plain = Config.__getattribute__

    def watched(self: Any, name: str) -> Any:
        if name[:1] != "_" and not sys._getframe(1).f_globals.get("__name__", "").startswith(MACHINERY):
            read[key_of(type(self))].add(name)
        return plain(self, name)

    Config.__getattribute__ = watched  # type: ignore[method-assign]
    return read


def key_of(section: type) -> str:
    """How a class of sections is called in `FILE`."""
    return f"{section.__module__}:{section.__qualname__}"


class Memory:
    """What the instances of a plugin hold: those made while data is prepared, and those that train.

    Attributes:
        training: whether instances are made for training from now on.
    """

    def __init__(self, cls: Any) -> None:
        self.training = False
        self._made: dict[bool, list[Any]] = {False: [], True: []}
        self._read: set[str] = set()
        self._own: set[int] = set()
        init, plain = cls.__init__, cls.__getattribute__

        def __init__(one: Any, config: Any) -> None:
            init(one, config)
            self._made[self.training].append(one)
            self._own.update({id(one)} if self.training else ())

        def __getattribute__(one: Any, name: str) -> Any:
            if id(one) in self._own:
                self._read.add(name)
            return plain(one, name)

        cls.__init__, cls.__getattribute__ = __init__, __getattribute__
        self._new = lambda config: _made_by(cls, init, config)

    def lost(self) -> list[str]:
        """Attributes that preparation changes, and that training reads without ever changing them."""
        found: set[str] = set()
        for before in self._made[False]:
            changed = self._changed(before)
            for during in self._made[True]:
                found |= changed & self._read - self._changed(during)
        return sorted(found)

    def _changed(self, one: Any) -> set[str]:
        """Attributes of an instance that are others than in a new one."""
        config = vars(one)["config"]
        new, other = vars(self._new(config)), vars(self._new(config))
        told = {name for name in vars(one) if name not in new or _same(new[name], other[name])}
        return {name for name in told if name not in new or not _same(vars(one)[name], new[name])}


def _made_by(cls: Any, init: Any, config: Any) -> Any:
    one = object.__new__(cls)
    init(one, config)
    return one


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # tensors have no truth value
        return False


def watch_logits(run: Run) -> list[str]:
    """From now on, the functions of torch that make a row as long as the vocabulary where the trainer's `loss` acts."""
    from torch.overrides import TorchFunctionMode

    found: list[str] = []
    active: list[str] = []
    size = run.hf_config.get_text_config().vocab_size
    call = run.stack.call

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            shape = getattr(made, "shape", ())
            name = getattr(func, "__name__", str(func))
            # `weight.T` is as long, and is no logits yet.
            own = active and active[-1] == "loss" and name != "__get__"
            if own and len(shape) > 1 and shape[-1] == size and made.is_floating_point():
                found.append(name)
            return made

    def watched(stage: str, **arguments: Any) -> Any:
        active.append(stage)
        try:
            if stage != "loss":
                return call(stage, **arguments)
            with Watch():
                return call(stage, **arguments)
        finally:
            active.pop()

    run.stack.call = watched  # type: ignore[method-assign]
    return found
