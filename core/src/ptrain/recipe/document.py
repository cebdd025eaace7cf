"""A recipe as it is written: plain data, and where each key and value stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ptrain.errors import Position

Place = tuple[str | int, ...]
"""Where in a recipe: keys and list indexes from the top."""


@dataclass
class Document:
    """A recipe as it is written.

    Attributes:
        data: mappings, lists, text, numbers, truth values and None.
        keys: position of a key (of a list entry: of its value), by its place.
        values: position of a value, by its place.
        file: what the recipe is called in messages.
        text: the text it was read from; empty for data that was there already.
    """

    data: dict[str, Any]
    keys: dict[Place, Position] = field(default_factory=dict)
    values: dict[Place, Position] = field(default_factory=dict)
    file: str = "recipe"
    text: str = ""

    def position(self, place: Place) -> Position:
        """Where the key at `place`, or the innermost thing round it that is written down, stands."""
        for end in range(len(place), 0, -1):
            if place[:end] in self.keys:
                return self.keys[place[:end]]
        return Position(self.file)

    def value_position(self, place: Place) -> Position:
        """Where the value at `place` stands, else `position(place)`."""
        return self.values.get(place) or self.position(place)


def from_mapping(mapping: Mapping[str, Any], file: str = "recipe") -> Document:
    """The document of data that is there already (a copy, in which paths are text); it has no positions."""
    return Document(_copy(mapping), file=file)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _copy(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(inner) for inner in value]
    return str(value) if isinstance(value, PurePath) else value
