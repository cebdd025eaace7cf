"""Environment references, `${env:NAME}`: kept as written in a recipe, replaced just before a part is built."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from ptrain.errors import RecipeError
from ptrain.recipe.config import ENV_REFERENCE
from ptrain.recipe.document import Place

C = TypeVar("C", bound=BaseModel)


def references(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """`(place, variable)` of every reference within plain data."""
    if isinstance(value, str):
        yield from ((place, name) for name in ENV_REFERENCE.findall(value))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from references(inner, (*place, key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from references(inner, (*place, index))


def resolve(config: C) -> C:
    """A copy of `config` in which references are replaced by what the variables hold.

    For use just before a part is built: the recipe itself keeps the references, and so no dump, log or
    checkpoint holds a secret.

    Raises:
        RecipeError: a variable is not set; names the key and the variable.
    """
    changed = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        replaced = _resolved(value, name)
        if replaced is not value:
            changed[name] = replaced
    return config.model_copy(update=changed) if changed else config


def resolve_known(config: C) -> C:
    """`resolve(config)`, or `config` as it is where a variable is not set, as in a recipe that is only looked at."""
    try:
        return resolve(config)
    except RecipeError:
        return config


def value_of(value: Any, key: str) -> Any:
    """The value of `key`, which belongs to no part, with what the variables hold, and `~` as the home directory.

    Raises:
        RecipeError: a variable is not set; names the key and the variable.
    """
    found = _resolved(value, key)
    return found.expanduser() if isinstance(found, Path) else found


def _resolved(value: Any, key: str) -> Any:
    if isinstance(value, str):
        return ENV_REFERENCE.sub(lambda match: _variable(match[1], key), value)
    if isinstance(value, os.PathLike):
        text = os.fspath(value)
        return type(value)(_resolved(text, key)) if ENV_REFERENCE.search(text) else value  # type: ignore[call-arg]
    if isinstance(value, BaseModel):
        return resolve(value)
    if isinstance(value, Mapping):
        return _same_if_equal(value, {k: _resolved(v, f"{key}.{k}") for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return _same_if_equal(value, type(value)(_resolved(v, f"{key}.{i}") for i, v in enumerate(value)))
    return value


def _same_if_equal(old: Any, new: Any) -> Any:
    return old if old == new else new


def _variable(name: str, key: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise RecipeError(
            f"`{key}` refers to the environment variable `{name}`, which is not set", fix=f"export {name}=..."
        )
    return value
