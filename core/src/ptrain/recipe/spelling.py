"""Several spellings of one key: which of them a recipe uses, and that it uses one alone."""

from __future__ import annotations

from ptrain.errors import Problem
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
    """Give the trainer its keys that stand in another section (`"model.gen_seq_length"` of its aliases)."""
    problems = []
    for alias, name in found.own.config.aliases.items():
        label, dot, key = alias.rpartition(".")
        section = found.single.get(label)
        if not dot or section is None or key not in section.data:
            continue
        value, old = section.data.pop(key), (*section.place, key)
        if name in found.own.data:
            winner = _winner(document, old, (name,))
            if winner is None:
                problems.append(_given_twice(document, old, (name,)))
            if winner != old:
                continue
        found.own.data[name] = value
        document.keys[(name,)] = document.position(old)
        document.values[(name,)] = document.value_position(old)
    return problems


def _winner(document: Document, *spellings: Place) -> Place | None:
    """The one spelling that is an override; None where none or several are."""
    winners = [one for one in spellings if is_override(document.position(one))]
    return winners[0] if len(winners) == 1 else None


def _given_twice(document: Document, one: Place, other: Place) -> Problem:
    first, second = sorted((document.position(one), document.position(other)))
    lines = f", lines {first.line} and {second.line}" if first.line < second.line else ""
    return Problem(f"`{dotted(other)}` is given twice{lines}: `{dotted(one)}` is the same key", second, fix="keep one")
