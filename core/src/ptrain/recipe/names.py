"""The names of a recipe's top level, and how keys and values are shown in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptrain.recipe import sections
from ptrain.recipe.config import NOTE

CORE_KEYS = frozenset(sections.CoreConfig.model_fields)
SECTIONS = frozenset(sections.Recipe.model_fields) - CORE_KEYS - {"type", "trainer"}
REQUIRED = ("model", "data")
SINGLE = {"model": "model", "tokenizer": "tokenizer", "optimizer": "optimizer", "scheduler": "scheduler"}
"""Sections that are one part, with its kind."""
LISTS = {"checkpoint": "checkpoint", "evaluation": "evaluator", "trackers": "tracker"}
"""Sections that are a list of parts, with their kind."""
SOURCES = ("sources", "eval_sources")
"""Keys of `data` that are lists of sources."""
KINDS = {**SINGLE, **LISTS, **{f"data.{key}": "source" for key in SOURCES}}
"""The kind of part of each section."""


def dotted(place: Sequence[str | int]) -> str:
    """`("data", "sources", 0)` as `data.sources.0`."""
    return ".".join(str(step) for step in place)


def show(value: Any) -> str:
    """A value as a message shows it: short, and as YAML would write it."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None:
        return "empty"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f'"{text}"' if isinstance(value, str) else text


def listed(names: Sequence[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(f"`{name}`" for name in names)


def is_note(key: str) -> bool:
    """Whether a key is a note that nobody reads."""
    return key.startswith(NOTE)
