"""`-o optimizer.lr=2e-5`: values given on the command line, applied to a recipe as it is written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ptrain.errors import Position, Problem, RecipeError
from ptrain.recipe.document import Document, Place
from ptrain.recipe.names import dotted
from ptrain.recipe.tree import read_value

MARK = "-o "
"""How the position of an override begins."""


def apply(document: Document, overrides: Sequence[str]) -> None:
    """Set each `dotted.key=value` in `document`, in order; numbers in the path are list indexes.

    A mapping or list that is missing on the way is made; the value is read as YAML. Its position is the override.

    Raises:
        RecipeError: no `=`, no key, an index that the list does not have, a way through a single value, or a
            value that is no YAML; all of them at once.
    """
    problems: list[Problem] = []
    for override in overrides:
        try:
            _apply(document, override)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError.of(problems)


def is_override(where: Position) -> bool:
    """Whether a position is that of an override."""
    return where.file.startswith(MARK)


def _apply(document: Document, override: str) -> None:
    where = Position(MARK + override)
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(
            f"the override `{override}` has no {'key' if equals else '`=`'}", where=where,
            expected="`-o key=value`, e.g. `-o optimizer.lr=2e-5`",
        )  # fmt: skip
    value = read_value(text, where.file)
    node: Any = document.data
    place: Place = ()
    for name, following in itertools.pairwise(names):
        step, node = _enter(node, name, [] if following == "0" else {}, place, where)
        place = (*place, step)
        document.keys.setdefault(place, where)
    place = (*place, _set(node, names[-1], value, place, where))
    _note(document, place, value, where)


def _enter(node: Any, name: str, new: Any, place: Place, where: Position) -> tuple[str | int, Any]:
    """The key or index that `name` means in `node`, and what is there (`new` if nothing is)."""
    if isinstance(node, list):
        index = _index(node, name, place, where)
        if index == len(node):
            node.append(new)
        return index, node[index]
    if not isinstance(node, dict):
        raise _through_scalar(node, name, place, where)
    if node.get(name) is None:
        node[name] = new
    return name, node[name]


def _set(node: Any, name: str, value: Any, place: Place, where: Position) -> str | int:
    if isinstance(node, list):
        index = _index(node, name, place, where)
        node[index : index + 1] = [value]
        return index
    if not isinstance(node, dict):
        raise _through_scalar(node, name, place, where)
    node[name] = value
    return name


def _index(node: list[Any], name: str, place: Place, where: Position) -> int:
    if not name.isdecimal() or int(name) > len(node):
        raise RecipeError(
            f"`{dotted(place)}` is a list of {len(node)}: it has no entry `{name}`", where=where,
            expected=f"an index from 0 to {len(node)} ({len(node)} adds an entry)",
        )  # fmt: skip
    return int(name)


def _through_scalar(node: Any, name: str, place: Place, where: Position) -> RecipeError:
    return RecipeError(
        f"`{dotted(place)}` is the single value `{node}`: it has no key `{name}`", where=where,
        expected="a section or a list on the way to the key",
    )  # fmt: skip


def _note(document: Document, place: Place, value: Any, where: Position) -> None:
    """Let `place` and everything under it stand at the override."""
    for positions in (document.keys, document.values):
        for old in [p for p in positions if p[: len(place)] == place]:
            del positions[old]
        positions[place] = where
