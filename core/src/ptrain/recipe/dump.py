"""A recipe as plain data again, and the hash of what decides its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

from ptrain.recipe.sections import Recipe

WITHOUT_EFFECT = frozenset(
    {
        "checkpoint", "code", "data.cache_dir", "data.dl_num_workers", "data.eval_sources",
        "data.fail_on_missing_cache", "data.num_proc", "eval_at_start", "eval_interval", "eval_log_iter_interval",
        "eval_micro_batch_size", "evaluation", "exit_iteration", "exit_iteration_this_run", "hang_timeout",
        "kill_switch_path", "logger", "loss_log_interval", "metadata", "output_dir", "trackers",
        "train_log_iter_interval", "train_log_metrics_path", "wandb",
    }
)  # fmt: skip
"""Keys that change where results go, when they are looked at or how fast they come, but not what is trained."""


def dump(recipe: Recipe, *, defaults: bool = False) -> dict[str, Any]:
    """The recipe as data for JSON or YAML, from which `load_recipe` makes an equal one.

    Every section has its `type`, and the trainer's own keys stand at the top level again. Environment
    references stay references.

    Args:
        defaults: with the keys that were not given too, for the record.
    """
    keys = plain(recipe, defaults)
    own = keys.pop("trainer", {})
    return {**keys, **own}


def result_hash(recipe: Recipe, code_sha256: str = "") -> str:
    """The sha256 of every value that changes what is trained, and of the user's own code.

    Two recipes with one hash give the same model: a run may be resumed with either.
    """
    kept = with_effect(dump(recipe, defaults=True), but=features_without_effect(recipe))
    text = json.dumps([kept, code_sha256], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any, defaults: bool = False) -> Any:
    """Sections, mappings and lists as data for JSON; a section has the keys that were given, and its `type`."""
    if isinstance(value, BaseModel):
        given = value.model_fields_set | ({"type"} if getattr(value, "type", "") else set())
        names = [name for name in type(value).model_fields if defaults or name in given]
        return {name: plain(getattr(value, name), defaults) for name in names}
    if isinstance(value, Mapping):
        return {key: plain(inner, defaults) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, defaults) for inner in value]
    return str(value) if isinstance(value, PurePath) else value


def features_without_effect(recipe: Recipe) -> frozenset[str]:
    """The dotted keys of the features that do not change what is trained."""
    return frozenset(f"plugins.{name}" for name, section in recipe.plugins.items() if section.without_effect)


def with_effect(keys: Mapping[str, Any], prefix: str = "", but: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The keys of a recipe, as `dump` gives them, that change what is trained.

    Args:
        prefix: of the dotted names of `keys`.
        but: dotted keys to leave out besides.
    """
    kept = {}
    for key, value in keys.items():
        name = f"{prefix}{key}"
        if name not in WITHOUT_EFFECT | but:
            kept[key] = with_effect(value, f"{name}.", but) if isinstance(value, dict) else value
    return kept
