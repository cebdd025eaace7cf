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
        other = name if name in section.data else used.get(name)
        if other is not None and not _overridden(section, document, alias, other):
            problems.append(_given_twice(document, (*section.place, alias), (*section.place, other)))
            del section.data[alias]
        if alias in section.data:
            used[name] = alias
            document.keys[(*section.place, name)] = document.position((*section.place, alias))
    return used, problems


def move(found: Gathered, document: Document) -> list[Problem]:
    """Give the trainer its keys that stand in another section (`"model.gen_seq_length"` of its aliases)."""
    problems = []
    for alias, name in found.own.config.aliases.items():
        label, dot, key = alias.rpartition(".")
        section = found.single.get(label)
        if not dot or section is None or key not in section.data:
            continue
        old = (*section.place, key)
        if name in found.own.data:
            problems.append(_given_twice(document, old, (name,)))
        found.own.data[name] = section.data.pop(key)
        document.keys[(name,)] = document.position(old)
        document.values[(name,)] = document.value_position(old)
    return problems


def _overridden(section: Section, document: Document, *spellings: str) -> bool:
    """Whether exactly one spelling is an override; then the other is dropped."""
    winners = [one for one in spellings if is_override(document.position((*section.place, one)))]
    if len(winners) != 1:
        return False
    for one in set(spellings) - set(winners):
        del section.data[one]
    return True


def _given_twice(document: Document, one: Place, other: Place) -> Problem:
    first, second = sorted((document.position(one), document.position(other)))
    lines = f", lines {first.line} and {second.line}" if first.line < second.line else ""
    return Problem(
        f"`{dotted(other)}` is given twice{lines}: `{dotted(one)}` is the same key", second, fix="keep one"
    )
