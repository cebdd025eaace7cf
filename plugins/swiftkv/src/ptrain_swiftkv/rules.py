"""Which models and layers SwiftKV goes with; told from a configuration's keys, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED = ["llama", "mistral", "qwen2", "qwen3", "deepseek_v2"]
"""The `model_type` of what a student can be made from; `ptrain_swiftkv.models.register` adds others."""
SUFFIX = "_swiftkv"
"""What a student has of its own is called as what it stands for, and this; so is its `model_type`."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one key of the recipe's `model`, what would be right, and what to do."""

    key: str
    message: str
    expected: str | None = None
    fix: str | None = None


def fault(base: Mapping[str, Any], kept: int | None, size: int | None) -> Fault | None:
    """What is wrong with keeping `kept` layers of a model, and groups of `size`; None if nothing is.

    Args:
        base: keys of the model's configuration: `model_type`, `num_hidden_layers`, `layer_types`.
        kept: `num_key_value_layers`.
        size: `key_value_group_size`.
    """
    kind = str(base.get("model_type"))
    if kind.endswith(SUFFIX):
        return _other_student(base, kept, size)
    if kind not in SUPPORTED:
        known = ", ".join(f"`{name}`" for name in SUPPORTED)
        return Fault("name_or_path", f"models of the type `{kind}` have no SwiftKV", f"one of {known}")
    layers = base.get("num_hidden_layers")
    return _layers(layers, kept, size or 1, base.get("layer_types")) if isinstance(layers, int) else None


def _other_student(base: Mapping[str, Any], kept: int | None, size: int | None) -> Fault | None:
    for key, wanted in (("num_key_value_layers", kept), ("key_value_group_size", size)):
        if wanted not in (None, base.get(key)):
            message = f"`model.{key}` is {wanted}, and the model is a SwiftKV model with {base.get(key)}"
            fix = f"leave `{key}` out to train it further, or name the model that it was made from"
            return Fault(key, message, fix=fix)
    return None


def _layers(layers: int, kept: int | None, size: int, kinds: Any) -> Fault | None:
    half = f"keep half of them: `num_key_value_layers: {max(1, layers // 2)}`"
    if kept is None:
        message = f"the recipe doesn't say how many of the {layers} layers stay as they are"
        return Fault("num_key_value_layers", message, fix=half)
    if not 1 <= kept <= layers:
        message = f"`model.num_key_value_layers` is {kept}, and the model has {layers} layers"
        return Fault("num_key_value_layers", message, f"1 to {layers}", half)
    shared = layers - kept
    if shared % size:
        message = f"`model.key_value_group_size` is {size}, which does not divide the {shared} layers that share"
        fitting = ", ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)
        return Fault("key_value_group_size", f"{message} keys and values", f"one of {fitting}")
    for first in range(kept, layers, size):
        if kinds and len(set(kinds[first : first + size])) > 1:
            message = (
                f"layers {first} to {first + size - 1} would share keys and values, and not all of them look equally "
                f"far back ({', '.join(kinds[first : first + size])})"
            )
            return Fault("key_value_group_size", message, fix="choose groups that end where windows begin")
    return None


def known_keys(model: Any) -> Mapping[str, Any]:
    """The keys of the model's configuration where they are in the recipe or in a folder; empty otherwise."""
    changed = getattr(model, "hf_config_kwargs", {})
    if given := getattr(model, "config", None):
        return {**given, **changed}
    file = Path(model.name_or_path or "", "config.json")
    try:
        return {**json.loads(file.read_text(encoding="utf-8")), **changed}
    except (OSError, ValueError):
        return {}
