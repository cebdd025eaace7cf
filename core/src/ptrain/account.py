"""What a run will be made of, before it runs: who acts at each stage, and where each setting comes from."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.errors import Position
from ptrain.layer import ALL, STAGES
from ptrain.recipe import overrides
from ptrain.recipe.config import ENV_REFERENCE
from ptrain.recipe.dump import dump
from ptrain.recipe.names import LISTS, dotted
from ptrain.stack import Stack

if TYPE_CHECKING:
    from ptrain.recipe.document import Document, Place
    from ptrain.run import Run


@dataclass(frozen=True)
class Act:
    """One layer's part in a stage.

    Attributes:
        layer: its name.
        origin: its distribution and version, or the file of your own code.
        role: "answers", "wraps", or the event of a callback.
        where: the file and line of the function.
    """

    layer: str
    origin: str
    role: str
    where: str


@dataclass(frozen=True)
class Setting:
    """One key of a recipe.

    Attributes:
        key: its dotted place.
        value: as plain data; references to the environment are not resolved.
        origin: "default", "recipe", "override" or "derived".
        source: the place in the recipe, the override, or why it was derived; empty for a default.
        environment: the variables that it refers to.
    """

    key: str
    value: Any
    origin: str
    source: str = ""
    environment: tuple[str, ...] = ()


def acts(stack: Stack) -> dict[str, list[Act]]:
    """Who acts at each stage, in the order in which they begin; stages in the order of a run."""
    return {
        stage: [Act(layer.name, layer.origin, role, _place(function)) for layer, role, function in stack.order(stage)]
        for stage in STAGES
    }


def kind(stage: str) -> str:
    """ "all" where every answer is called, otherwise "first": the topmost that gives one."""
    return "all" if stage in ALL else "first"


def _place(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{Path(code.co_filename)}:{code.co_firstlineno}" if code is not None else ""


def settings(run: Run) -> list[Setting]:
    """Every key with its value and where that comes from, in the order of the sections."""
    return [_setting(run, place, value) for place, value in _leaves(dump(run.recipe, defaults=True))]


def _leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Keys that hold no further keys; lists are followed where their entries are sections."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*place, key))
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*place, index))
    else:
        yield place, value


def _setting(run: Run, place: Place, value: Any) -> Setting:
    key, variables = dotted(place), tuple(ENV_REFERENCE.findall(json.dumps(value, default=str)))
    if key in run.derived:
        return Setting(key, value, "derived", run.derived[key][1], variables)
    where = _written(run.loaded.document, place, value)
    if where is None:
        return Setting(key, value, "default", "", variables)
    return Setting(key, value, "override" if overrides.is_override(where) else "recipe", str(where), variables)


def _written(document: Document, place: Place, value: Any) -> Position | None:
    """Where a key, or the value that it is a part of, is written; None for a default."""
    # A list of one section may be written as the section.
    short = (place[0], *place[2:]) if len(place) > 2 and place[0] in LISTS and place[1] == 0 else place
    for one in (place, short):
        if one in document.keys:
            return document.keys[one]
        # An entry of a list may be a name alone: that of the part, or of a source's data.
        if isinstance(value, str) and _value(document, one[:-1]) == value:
            return document.value_position(one[:-1])
    return None


def _value(document: Document, place: Place) -> Any:
    """The text that is written at a place, or None."""
    found: Any = document.data
    for step in place:
        if isinstance(found, Mapping):
            found = found.get(str(step))
        elif isinstance(found, list) and isinstance(step, int) and step < len(found):
            found = found[step]
        else:
            return None
    return found if isinstance(found, str) else None
