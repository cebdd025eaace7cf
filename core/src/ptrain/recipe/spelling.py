"""Several spellings of one key: which of them a recipe uses, and that it uses one alone."""

from __future__ import annotations

from collections.abc import Iterable

from ptrain.errors import Problem
from ptrain.recipe.config import Config
from ptrain.recipe.document import Document, Place
from ptrain.recipe.gather import Gathered
from ptrain.recipe.names import dotted
from ptrain.recipe.overrides import is_override
from ptrain.recipe.resolve import Section


def settle(section: Section, document: Document) -> tuple[dict[str, str], list[Problem]]:
    """The alias in use for each field that is given by one, and keys that are given twice.

    An override takes the place of whatever spelling the file has. Afterwards a field has its position under
    its own name too.
    """
    used: dict[str, str] = {}
    problems = []
    for alias, name in section.config.aliases.items():
        if alias not in section.data or "." in alias:
            continue
        here = (*section.place, alias)
        other = name if name in section.data else used.get(name)
        if other is not None:
            there = (*section.place, other)
            winner = _winner(document, here, there)
            if winner is None:
                problems.append(_given_twice(document, here, there))
            del section.data[other if winner == here else alias]
        if alias in section.data:
            used[name] = alias
            document.keys[(*section.place, name)] = document.position(here)
    return used, problems


def move(found: Gathered, document: Document) -> list[Problem]:
    """Give the trainer and the features their keys that stand elsewhere.

    `"model.gen_seq_length"` of a trainer's aliases stands in the section `model`, `".window"` of a feature's at the
    top level.
    """
    keys = top_level(found.features.values())
    top = Section("", (), {key: value for key, value in document.data.items() if key in keys}, Config)
    problems = []
    for owner in (found.own, *found.features.values()):
        for alias, name in owner.config.aliases.items():
            label, dot, key = alias.rpartition(".")
            section = found.single.get(label) if label else top
            if dot and section is not None and key in section.data:
                problems += _moved(section, key, owner, name, document)
    return problems


def top_level(features: Iterable[Section]) -> set[str]:
    """The keys of features that may stand at the top level."""
    aliases = (alias for section in features for alias in section.config.aliases)
    return {alias.removeprefix(".") for alias in aliases if alias.startswith(".")}


def _moved(section: Section, key: str, owner: Section, name: str, document: Document) -> list[Problem]:
    """Give `owner` the `key` of `section` as its key `name`; what is wrong with that."""
    value, old, new = section.data.pop(key), (*section.place, key), (*owner.place, name)
    if name in owner.data:
        winner = _winner(document, old, new)
        if winner != old:
            return [] if winner else [_given_twice(document, old, new)]
    owner.data[name] = value
    document.keys[new] = document.position(old)
    document.values[new] = document.value_position(old)
    return []


def _winner(document: Document, *spellings: Place) -> Place | None:
    """The one spelling that is an override; None where none or several are."""
    winners = [one for one in spellings if is_override(document.position(one))]
    return winners[0] if len(winners) == 1 else None


def _given_twice(document: Document, one: Place, other: Place) -> Problem:
    first, second = sorted((document.position(one), document.position(other)))
    lines = f", lines {first.line} and {second.line}" if first.line < second.line else ""
    return Problem(f"`{dotted(other)}` is given twice{lines}: `{dotted(one)}` is the same key", second, fix="keep one")
