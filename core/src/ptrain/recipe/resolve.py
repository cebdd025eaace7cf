"""From names to classes: which part, trainer or feature owns a section. Only what is chosen is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ptrain.catalog import Catalog, Offer
from ptrain.errors import PluginError, Position, Problem
from ptrain.recipe.config import Config
from ptrain.recipe.document import Document, Place
from ptrain.recipe.elsewhere import part_elsewhere
from ptrain.recipe.names import dotted, listed, show
from ptrain.recipe.suggest import closest

PARTS = {"model": "huggingface", "tokenizer": "huggingface", "optimizer": "adamw", "scheduler": "huggingface"}
"""The part of a section where neither the recipe nor the trainer names one."""


@dataclass
class Section:
    """A section of a recipe and the class that owns it.

    Attributes:
        label: what it is called in messages: "" (the top level), "model", "data.sources", ...
        place: where it stands in the recipe.
        data: its keys as they are written.
        config: what validates it.
        owner: the part, trainer or feature; None where core itself owns it.
        type: the name that chose the owner.
        value: what validation made of it; None before, and where it has problems.
    """

    label: str
    place: Place
    data: dict[str, Any]
    config: type[Config]
    owner: Any = None
    type: str = ""
    value: Any = None

    @property
    def accepts(self) -> set[str]:
        """The keys that may stand in it, in every spelling."""
        return set(self.config.model_fields) | {alias for alias in self.config.aliases if "." not in alias}


@dataclass
class Resolver:
    """Finds and imports what a recipe names, and notes what is wrong with it.

    Attributes:
        defaults: the name of the part of each kind that the recipe need not name.
        origins: the offer of every class that was loaded.
        problems: what is wrong with the recipe.
        broken: what is wrong with plugins.
    """

    document: Document
    catalog: Catalog
    defaults: Mapping[str, str] = field(default_factory=dict)
    origins: dict[type, Offer] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: list[Problem] = field(default_factory=list)

    def load(self, kind: str, name: str, where: Position) -> Any:
        """The class that `name`, which stands at `where`, means, or None: then a problem was noted."""
        try:
            offer = self.catalog.find(kind, name)
        except PluginError as error:
            self.problems += [replace(problem, where=where) for problem in error.problems]
            return None
        try:
            found = self.catalog.load(offer)
        except PluginError as error:
            self.broken += [replace(problem, where=problem.where or where) for problem in error.problems]
            return None
        self.origins[found] = offer
        return found

    def trainer(self) -> tuple[str, Any]:
        """The name and the class of the trainer; the class is None where it could not be found."""
        name, place = self._type_in(self.document.data, (), "trainer")
        if name is None:
            if "type" not in self.document.data:
                message = "`type` is missing: the recipe names no trainer"
                self._wrong(message, (), self._one_of("trainer"), self._misplaced_trainer())
            return "", None
        trainer = self.load("trainer", name, self.document.value_position(place))
        self.defaults = {**PARTS, **getattr(trainer, "parts", {})}
        return name, trainer

    def _misplaced_trainer(self) -> str | None:
        """What to do where the name of a trainer stands in a section."""
        for label, section in self.document.data.items():
            if isinstance(section, Mapping) and section.get("type") in self.catalog.names("trainer"):
                return f"move `type` of `{label}` to the top level"
        return None

    def part(self, label: str, place: Place, value: Any, kind: str) -> Section | None:
        """The section at `place`, which is one part; None where a problem was noted."""
        data = self.mapping(place, value)
        if data is None:
            return None
        name, type_place = self._type_in(data, place, kind)
        name = name or self.defaults.get(kind)
        if not name:
            if "type" not in data:
                self._wrong(f"`{dotted(place)}` has no `type`", place, self._one_of(kind))
            return None
        owner = self.load(kind, name, self.document.value_position(type_place))
        return None if owner is None else Section(label, place, data, owner.Config, owner, name)

    def parts(self, label: str, place: Place, value: Any, kind: str) -> list[Section | None]:
        """The sections of a list of parts; one that is no list is its only entry."""
        if isinstance(value, list):
            return [self._entry(label, (*place, index), one, kind) for index, one in enumerate(value)]
        if isinstance(value, (Mapping, str)):
            return [self._entry(label, place, value, kind)]
        self.wrong_shape(place, value, "a list of sections with a `type`")
        return []

    def _entry(self, label: str, place: Place, value: Any, kind: str) -> Section | None:
        """One part of a list; text stands for its `type`, or for the name of a source's data."""
        if not isinstance(value, str):
            return self.part(label, place, value, kind)
        if kind == "source":
            return self._named_source(label, place, value)
        owner = self.load(kind, value, self.document.value_position(place))
        return None if owner is None else Section(label, place, {}, owner.Config, owner, value)

    def _named_source(self, label: str, place: Place, name: str) -> Section | None:
        if name in self.catalog.names("source"):
            message = f"`{name}` is a type of source, not the name of a data set"
            self._wrong(message, place, fix=f"write `{{type: {name}, ...}}`")
            return None
        if "/" not in name and part_elsewhere("source", name):
            self.load("source", name, self.document.value_position(place))  # which notes where it went
            return None
        section = self.part(label, place, {"name_or_path": name}, "source")
        if section is not None and "name_or_path" not in section.accepts:
            message = f"a source of type `{section.type}` has no name, such as `{name}`"
            self._wrong(message, place, fix=f"write `{{type: {section.type}, ...}}`")
            return None
        return section

    def mapping(self, place: Place, value: Any) -> dict[str, Any] | None:
        """`value`, if it is keys with values; else None, and a problem was noted."""
        if isinstance(value, Mapping):
            return dict(value)
        self.wrong_shape(place, value, "keys with values")
        return None

    def wrong_shape(self, place: Place, value: Any, expected: str) -> None:
        """Note that the value at `place` is of another kind than `expected`."""
        if value is None:
            self._wrong(f"`{dotted(place)}` is empty", place, expected, "leave it out, or give it keys")
        else:
            self._wrong(f"`{dotted(place)}` is {show(value)}", place, expected)

    def _wrong(self, message: str, place: Place, expected: str | None = None, fix: str | None = None) -> None:
        self.problems.append(Problem(message, self.document.value_position(place), expected, fix))

    def _type_in(self, data: Mapping[str, Any], place: Place, kind: str) -> tuple[str | None, Place]:
        """What `type` says, and where; a misspelt `type` counts, so that one typo is one problem."""
        if "type" in data:
            name = data["type"]
            if isinstance(name, str) and name:
                return name, (*place, "type")
            message = f"`{dotted((*place, 'type'))}` is {show(name)}"
            self._wrong(message, (*place, "type"), f"the name of a {kind}")
            return None, place
        names = set(self.catalog.names(kind))
        for key, value in data.items():
            if closest(key, ["type"]) and isinstance(value, str) and value in names:
                return value, (*place, key)
        return None, place

    def _one_of(self, kind: str) -> str:
        names = self.catalog.names(kind)
        return f"one of {listed(names)}" if names else f"an installed {kind}"
