"""What pydantic found, as problems with a place, what was expected and what was likely meant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ptrain.errors import Problem
from ptrain.recipe.describe import choices, describe, sections_in
from ptrain.recipe.document import Document, Place
from ptrain.recipe.elsewhere import key_elsewhere
from ptrain.recipe.names import dotted, listed, show
from ptrain.recipe.resolve import Section
from ptrain.recipe.suggest import closest, distance

MANY = 16
"""More keys than this are not listed in a message."""
MOST_GUESSES = 4
"""Nor more guesses than this."""


@dataclass
class Explainer:
    """Gathers the problems of all sections.

    Attributes:
        related: for a section's label, the keys of parts that the recipe did not choose, by their type.
        accepted: the keys of every section, by its label.
        problems: what is wrong with values.
    """

    document: Document
    related: Callable[[str], Mapping[str, set[str]]]
    accepted: dict[str, set[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _unknown: list[tuple[str, str, Place, list[str]]] = field(default_factory=list)
    _missing: list[tuple[str, Place, Problem]] = field(default_factory=list)
    _meant: set[Place] = field(default_factory=set)
    _meant_in: set[tuple[str, str]] = field(default_factory=set)

    def knows(self, label: str, keys: Iterable[str], config: type[BaseModel] | None = None) -> None:
        """Note which keys the section `label` accepts, and those of the sections within its `config`."""
        self.accepted.setdefault(label, set()).update(keys)
        if config is None:
            return
        for name in config.model_fields:
            if inner := _model_of(config, name):
                self.knows(f"{label}.{name}" if label else name, inner.model_fields, inner)

    def result(self) -> list[Problem]:
        """Every problem; a missing key is left out where a misspelt one is reported that means it."""
        unknown = [self._explained(*one) for one in self._unknown]
        kept = [
            problem
            for label, place, problem in self._missing
            if place not in self._meant and (label, place[-1]) not in self._meant_in
        ]
        return self.problems + unknown + kept

    def missing(self, label: str, key: str, place: Place, expected: str | None) -> None:
        """Note that the section at `place` lacks `key`."""
        problem = Problem(f"`{dotted((*place, key))}` is missing", self.document.position(place), expected)
        self._missing.append((label, (*place, key), problem))

    def section(self, section: Section, error: ValidationError, aliases: Mapping[str, str]) -> None:
        """Explain what pydantic found in `section`; `aliases` are the spellings that it was given in."""
        values: dict[Place, Any] = {}
        for found in error.errors(include_url=False):
            inner = _written(section.data, found["loc"], aliases)
            if found["type"] == "extra_forbidden":
                self._extra(section, inner)
            elif found["type"] == "missing" and len(found["loc"]) > len(inner):
                self._lacks(section, inner, str(found["loc"][len(inner)]))
            else:
                values.setdefault(inner, found)
        for inner, found in values.items():
            # A union complains of the whole and of the entry that is wrong: the entry says more.
            if not any(other != inner and other[: len(inner)] == inner for other in values):
                self._value(section, inner, found)

    def unknown(self, label: str, key: str, place: Place, own: Iterable[str]) -> None:
        """Note that the section `label` has no `key`, which stands at `place`; `own` are those that it has."""
        self._unknown.append((label, key, place, sorted(own)))

    def _explained(self, label: str, key: str, place: Place, own: list[str]) -> Problem:
        where = self.document.position(place)
        message = f"`{label}` has no key `{key}`" if label else f"there is no key `{key}` at the top level"
        kind = "source" if label in ("data.sources", "data.eval_sources") else label
        if advice := key_elsewhere(kind, key):
            return Problem(f"{message} here: {advice.reason}", where, fix=advice.fix)
        fix = self._fix(label, key, place, own)
        expected = None if fix or len(own) > MANY else f"one of {listed(own)}"
        return Problem(message, where, expected, fix)

    def _fix(self, label: str, key: str, place: Place, own: Sequence[str]) -> str | None:
        """What was likely meant: a similar key here, the same one elsewhere, a similar one elsewhere."""
        near, homes = closest(key, own), self._homes(label, key)
        others = [f"`type: {other}`" for other, keys in self.related(label).items() if key in keys]
        if near and distance(key, near) > 1 and (homes or others or self._better(label, key, near)):
            near = None
        told = [f"write `{near}`"] if near else []
        if near:
            self._meant.add((*place[:-1], near))
        if others:
            told.append(f"it is a key of {', '.join(others[:MOST_GUESSES])}")
        if homes:
            told.append(f"it belongs {' or '.join(map(_in, homes[:MOST_GUESSES]))}")
            self._meant_in.update((home, key) for home in homes)
        if not told and (better := self._better(label, key, near)):
            told.append(f"write `{better[1]}` {_in(better[0])}")
            self._meant_in.add(better)
        return ", or ".join(told) or None

    def _homes(self, label: str, key: str) -> list[str]:
        """Other sections that accept exactly `key`; those that lack it are named alone, if any does."""
        homes = [other for other, keys in self.accepted.items() if other != label and key in keys]
        lacking = {home for home, place, _ in self._missing if place[-1] == key}
        return [home for home in homes if home in lacking] or homes

    def _better(self, label: str, key: str, near: str | None) -> tuple[str, str] | None:
        """`(section, key)` elsewhere that is closer to `key` than `near` is."""
        limit = distance(key, near) if near else None
        best: tuple[int, str, str] | None = None
        for other, keys in self.accepted.items():
            guess = closest(key, keys) if other != label else None
            rank = (distance(key, guess), other, guess) if guess else None
            if rank and (limit is None or rank[0] < limit) and (best is None or rank < best):
                best = rank
        return (best[1], best[2]) if best else None

    def _extra(self, section: Section, inner: Place) -> None:
        *outer, key = inner
        holder: type[BaseModel] = section.config
        for step in outer:
            holder = _model_of(holder, step) or holder
        label = ".".join([*([section.label] if section.label else []), *map(str, outer)])
        own = set(holder.model_fields) if outer else section.accepts
        self.unknown(label, str(key), (*section.place, *inner), own)

    def _lacks(self, section: Section, inner: Place, key: str) -> None:
        info = _field(section.config, (*inner, key))
        self.missing(section.label, key, (*section.place, *inner), describe(info) if info else None)

    def _value(self, section: Section, inner: Place, found: Any) -> None:
        place = (*section.place, *inner)
        where = self.document.value_position(place) if inner else self.document.position(place)
        info = _field(section.config, inner)
        cause = found.get("ctx", {}).get("error") if found["type"] == "value_error" else None
        if cause is not None:
            name = f"`{dotted(place)}`: " if place else ""
            self.problems.append(Problem(f"{name}{cause}", where))
            return
        value = _at(section.data, inner)
        expected = describe(info) if info else found["msg"]
        guess = closest(value, choices(info)) if info and isinstance(value, str) else None
        fix = f"write `{guess}`" if guess else None
        self.problems.append(Problem(f"`{dotted(place)}` is {show(value)}", where, expected, fix))


def _in(label: str) -> str:
    return f"in `{label}`" if label else "at the top level"


def _written(data: Any, loc: Sequence[str | int], aliases: Mapping[str, str]) -> Place:
    """The beginning of pydantic's `loc` that stands in the recipe, in the recipe's own spelling."""
    place: list[str | int] = []
    for step in loc:
        spelt = aliases.get(str(step), step) if not place else step
        if isinstance(data, Mapping) and spelt in data:
            data = data[spelt]
        elif isinstance(data, (list, tuple)) and isinstance(step, int) and step < len(data):
            data = data[step]
        elif isinstance(data, (list, tuple)) and isinstance(step, str):
            continue  # the name of a member of a union, which stands in no recipe
        else:
            break
        place.append(spelt)
    return tuple(place)


def _at(data: Any, place: Place) -> Any:
    for step in place:
        data = data[step]
    return data


@functools.cache
def _model_of(config: type[BaseModel], step: str | int) -> type[BaseModel] | None:
    info = config.model_fields.get(str(step))
    return next(iter(sections_in(info.annotation)), None) if info else None


def _field(config: Any, place: Sequence[str | int]) -> FieldInfo | None:
    """The field at `place`; that of a list where `place` is one of its entries."""
    info: FieldInfo | None = None
    for step in place:
        if isinstance(step, int):
            continue
        name = getattr(config, "aliases", {}).get(step, step)
        info = config.model_fields.get(name)
        config = _model_of(config, name)
        if config is None:
            break
    return info
