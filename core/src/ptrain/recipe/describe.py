"""A type of a config field in words, for messages: `Annotated[int, Ge(1)] | None` is "a whole number of at least 1"."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_PLAIN = {
    bool: "`true` or `false`", int: "a whole number", float: "a number", str: "text", Path: "a path", Any: "any value",
    dict: "keys with values", list: "a list", type(None): "nothing",
}  # fmt: skip
_NUMBERS = {2: "two", 3: "three", 4: "four"}


def describe(field: FieldInfo) -> str:
    """What the field takes, in words."""
    return in_words(field.annotation, field.metadata)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The typed sections that an annotation takes: itself, or members of a union."""
    options = [annotation, *get_args(annotation)]
    # `list[int]` passes for a class on Python 3.10.
    classes = [one for one in options if isinstance(one, type) and get_origin(one) is None]
    return [one for one in classes if issubclass(one, BaseModel)]


def choices(field: FieldInfo) -> list[str]:
    """The words that the field takes, where it takes one of a few."""
    options = [field.annotation, *get_args(field.annotation)]
    return [word for one in options if get_origin(one) is Literal for word in get_args(one) if isinstance(word, str)]


def in_words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a field of this type takes, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        told = [in_words(one, metadata) for one in arguments if one is not type(None)]
        return " or ".join(dict.fromkeys(told))
    if origin is Literal:
        return _one_of(arguments)
    if origin is list:
        entries = "a list" if arguments[0] is Any else f"a list, each {in_words(arguments[0])}"
        return (
            f"{entries}; at least one" if any(isinstance(one, annotated_types.MinLen) for one in metadata) else entries
        )
    if origin is tuple:
        return f"a list of {_NUMBERS.get(len(arguments), len(arguments))}, each {in_words(arguments[0])}"
    if origin in (dict, Mapping):
        return "keys with values"
    if sections_in(annotation):
        return "a section"
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation))) + _bounds(metadata)


def _one_of(values: Iterable[Any]) -> str:
    shown = [f"`{value}`" for value in values]
    return shown[0] if len(shown) == 1 else "one of " + ", ".join(shown)


def _bounds(metadata: Iterable[Any]) -> str:
    told = []
    for bound in _unfolded(metadata):
        if isinstance(bound, annotated_types.Ge):
            told.append(f"at least {bound.ge}")
        elif isinstance(bound, annotated_types.Gt):
            told.append(f"more than {bound.gt}")
        elif isinstance(bound, annotated_types.Le):
            told.append(f"at most {bound.le}")
        elif isinstance(bound, annotated_types.Lt):
            told.append(f"less than {bound.lt}")
    return f" of {' and '.join(told)}" if told else ""


def _unfolded(metadata: Iterable[Any]) -> list[Any]:
    """The bounds within `Field(...)`, which pydantic leaves folded in the types of entries and unions."""
    return [inner for one in metadata for inner in (one.metadata if isinstance(one, FieldInfo) else [one])]
