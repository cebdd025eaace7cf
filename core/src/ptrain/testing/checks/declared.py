"""Checks of what a plugin declares: nothing is trained for them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ptrain.errors import PluginError

if TYPE_CHECKING:
    from ptrain.testing.study import Study


def hooks(study: Study) -> None:
    """Hook implementations and callbacks fit their stages, and methods of parts those of their kind.

    A method that takes other arguments than it is given fails in the middle of a run, or is never called.
    """
    from ptrain.layer import Layer, check_callback, check_layer
    from ptrain.parts import KINDS

    cls, offer = study.cls, study.offer
    if study.kind not in ("trainer", "plugin"):
        _check_methods(study, KINDS[study.kind])
        return
    layer = Layer(cls, offer.name, f"{offer.distribution} {offer.version}", tuple(cls.callbacks))
    check_layer(layer)
    for event, callback in layer.callbacks:
        check_callback(layer, event, callback)


def _check_methods(study: Study, base: type) -> None:
    """The methods of a part take what those of its kind do; what they take besides has a default."""
    for name, promised in inspect.getmembers(base, inspect.isfunction):
        if name.startswith("_") or getattr(study.cls, name) is promised:
            continue
        wanted = list(inspect.signature(promised).parameters)
        found = inspect.signature(getattr(study.cls, name))
        try:
            found.bind(*wanted)
        except TypeError as error:
            raise study.wrong(
                f"`{name}{found}` can't be called: {error}", expected=f"`{name}({', '.join(wanted)})`"
            ) from None


def config(study: Study) -> None:
    """Sections are frozen, refuse unknown keys, say the type and the meaning of each key, and survive being written.

    A run is trained from the recipe as it was written down; one that comes back as another trains another thing.
    """
    for section in sections(study.cls):
        for key, wanted in (("frozen", True), ("extra", "forbid")):
            if (found := section.model_config.get(key)) != wanted:
                raise study.wrong(
                    f"`{section.__qualname__}` has `{key}={found!r}`",
                    expected=f"`{key}={wanted!r}`, as `ptrain.Config`",
                )
        _check_schema(study, section)
    _check_round_trip(study)


def sections(cls: Any) -> Iterator[Any]:
    """The `Config` of a plugin, and the `Data` of a trainer."""
    yield cls.Config
    if hasattr(cls, "Data"):
        yield cls.Data


def _check_schema(study: Study, section: Any) -> None:
    try:
        properties = section.model_json_schema().get("properties", {})
    except Exception as error:
        raise study.wrong(
            f"`{section.__qualname__}` has no JSON schema: {error}", expected="types that YAML can say"
        ) from error
    for name, field in section.model_fields.items():
        told = {key: value for key, value in properties.get(name, {}).items() if key in TYPED}
        if not told:
            raise study.wrong(f"`{section.__qualname__}.{name}` has no type", expected="an annotation that says more")
        if not (field.description or "").strip():
            raise study.wrong(
                f"`{section.__qualname__}.{name}` is not documented", expected="a docstring under the field"
            )


TYPED = ("type", "anyOf", "oneOf", "allOf", "$ref", "enum", "const")
"""What a JSON schema says of a type."""


def _check_round_trip(study: Study) -> None:
    from ptrain.recipe.dump import dump
    from ptrain.recipe.load import load_recipe

    recipe = study.loaded.recipe
    for defaults in (False, True):
        written = json.loads(json.dumps(dump(recipe, defaults=defaults)))
        try:
            again = load_recipe(written).recipe
        except PluginError:
            raise
        except Exception as error:
            raise study.wrong(
                f"its section is refused when it is read as it was written: {error}", expected="dump and load to agree"
            ) from error
        before, after = dump(recipe, defaults=True), dump(again, defaults=True)
        if before != after:
            raise study.wrong(
                f"its section is another after it was written and read: {_first_difference(before, after)}",
                expected="dump and load to give the same values",
                fix="let validators leave alone what they have made",
            )


def _first_difference(before: Any, after: Any) -> str:
    from ptrain.checks import differing

    return differing(before, after)[0]
