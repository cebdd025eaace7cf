"""`Config`, the base of every typed section, and how values are read from a recipe."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from ptrain.recipe.describe import in_words
from ptrain.recipe.numbers import parse_number

ENV_REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")

NOTE = "x-"
"""A key that begins like this is a note: nobody reads it."""


class Config(BaseModel):
    """A typed section of a recipe: frozen, and an unknown key is an error.

    Subclass it, nested in the part or plugin that owns the section:

        class Config(ptrain.Config):
            beta: float = 0.1
            '''How far the policy may move from the reference.'''

    `aliases` gives further spellings of fields. In a trainer's `Config`, `"model.gen_seq_length":
    "gen_seq_length"` takes a key that stands in another section; in a feature's, `".window": "size"` takes `window` of
    the top level. Keys that begin with `x-` are notes.

    Numbers may be written the way people do (`200k`, `1.25e-4`, `2_000`, `128ki`); a truth value is
    `true` or `false` and nothing else. The docstring under a field is its documentation.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        protected_namespaces=(),
        arbitrary_types_allowed=False,
        allow_inf_nan=False,
    )

    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spellings of fields: alias -> name of the field."""
    without_effect: ClassVar[bool] = False
    """Of a feature's keys: whether they change how fast results come and what memory they take, but not what is
    trained. A run may then be resumed with other values, or without the feature."""

    @model_validator(mode="before")
    @classmethod
    def _read_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        keys = {key: value for key, value in data.items() if not str(key).startswith(NOTE)}
        for alias, name in cls.aliases.items():
            if alias in keys and name not in keys:
                keys[name] = keys.pop(alias)
        return keys

    @field_validator("*", mode="before")
    @classmethod
    def _read_as_written(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        return value if field is None else read_as(value, field.annotation)


def _accepts(annotation: Any) -> set[Any]:
    """The plain types that an annotation takes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return set().union(*(_accepts(one) for one in arguments))
    if origin is Annotated:
        return _accepts(arguments[0])
    return {annotation if origin is None else origin}


def read_as(value: Any, annotation: Any) -> Any:
    """`value` as a person meant it for a field of this type; ValueError says why it can't be."""
    accepted = _accepts(annotation)
    if isinstance(value, list):
        return _read_entries(value, annotation)
    numeric = accepted & {int, float}
    if isinstance(value, str) and Literal in accepted and accepted & {int, float, bool} and not accepted & {str, Any}:
        return _word_or(value, annotation)
    if isinstance(value, bool):
        if numeric and not accepted & {bool, Any}:
            raise ValueError(f"a number is expected, not `{str(value).lower()}`")
        return value
    if bool in accepted and not accepted & {str, int, float, Any}:
        if value is not None or type(None) not in accepted:
            raise ValueError(f"{in_words(annotation)} is expected")
        return value
    if isinstance(value, str) and numeric and not accepted & {str, Any, Path}:
        if ENV_REFERENCE.search(value):
            raise ValueError("an environment reference stands only for text, not for a number")
        return parse_number(value, integral=float not in accepted)
    return value


def _word_or(value: str, annotation: Any) -> Any:
    """`value` where it is one of the words that a field takes beside numbers and truth values, or a number for it."""
    options = {one: get_args(one) for one in get_args(annotation)}
    if any(value in words for one, words in options.items() if get_origin(one) is Literal):
        return value
    try:
        if numeric := _accepts(annotation) & {int, float}:
            return parse_number(value, integral=float not in numeric)
    except ValueError:
        pass  # which knows of numbers alone
    raise ValueError(f"{in_words(annotation)} is expected, not `{value}`")


def _read_entries(values: list[Any], annotation: Any) -> list[Any]:
    """The entries of a list, read as the annotation says that each is; left alone where it says nothing."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    for option in options:
        arguments = get_args(option)
        if get_origin(option) is list:
            return [read_as(value, arguments[0]) for value in values]
        if get_origin(option) is tuple and len(arguments) == len(values):
            return [read_as(value, one) for value, one in zip(values, arguments, strict=True)]
    return values
