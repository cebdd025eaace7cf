"""What the recipe of a student can say wrong: one message each, before anything is done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import run

from ptrain_swiftkv.models import FAMILIES
from ptrain_swiftkv.rules import SUPPORTED, fault

LLAMA = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 32}
STUDENT = {**LLAMA, "model_type": "llama_swiftkv", "num_key_value_layers": 4, "key_value_group_size": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "more kept layers than layers": (
        LLAMA, {"num_key_value_layers": 9}, {},
        r"4:3: `model.num_key_value_layers` is 9, and the model has 8 layers.*expected: 1 to 8.*fix: keep half",
    ),
    "none kept": (LLAMA, {"num_key_value_layers": 0}, {}, r"`model.num_key_value_layers` is 0.*at least 1"),
    "not said": (LLAMA, {}, {}, r"doesn't say how many of the 8 layers stay.*num_key_value_layers: 4"),
    "groups that do not divide": (
        LLAMA, {"num_key_value_layers": 2, "key_value_group_size": 4}, {},
        r"`model.key_value_group_size` is 4, which does not divide the 6 layers.*one of 1, 2, 3, 6",
    ),
    "another family": (
        {**LLAMA, "model_type": "gpt2"}, {"num_key_value_layers": 4}, {},
        r"models of the type `gpt2` have no SwiftKV.*one of `llama`, `mistral`, `qwen2`, `qwen3`, `deepseek_v2`",
    ),
    "windows within a group": (
        {**LLAMA, "model_type": "qwen2", "layer_types": ["full_attention"] * 5 + ["sliding_attention"] * 3},
        {"num_key_value_layers": 4, "key_value_group_size": 2}, {},
        r"layers 4 to 5 would share keys and values.*full_attention, sliding_attention.*end where windows begin",
    ),
    "another student": (
        STUDENT, {"num_key_value_layers": 2}, {},
        r"`model.num_key_value_layers` is 2, and the model is a SwiftKV model with 4.*leave `num_key_value_layers` out",
    ),
    "an adapter": (
        LLAMA, {"num_key_value_layers": 4, "peft_config": {"r": 4}}, {}, r"`peft_config` has no place in SwiftKV",
    ),
    "a hidden state that there is not": (
        LLAMA, {"num_key_value_layers": 4}, {"hidden_loss_layer": 9}, r"`hidden_loss_layer` is 9.*expected: -9 to 8",
    ),
    "no temperature": (LLAMA, {"num_key_value_layers": 4}, {"logits_loss_temp": 0}, r"`logits_loss_temp` is 0"),
    "a slip of the pen": (
        LLAMA, {"num_key_value_layer": 4}, {}, r"`model` has no key `num_key_value_layer`.*`num_key_value_layers`"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_message(name: str, tmp_path: Path) -> None:
    config, model, keys, says = CASES[name]
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipe = {
        "type": "swiftkv", "model": {"name_or_path": str(base), **model},
        "data": {"sources": [{"type": "jsonl", "path": str(tmp_path / "rows.jsonl")}], "max_length": 64}, **keys,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    code, out, err = run("check", path)
    said = " ".join((out + err).split())
    assert code == 2, said
    assert re.search(says, said), said
    assert said.count("error:") == 1


def test_a_student_may_be_trained_further() -> None:
    """Without its keys, and with the same ones."""
    assert fault(STUDENT, None, None) is None
    assert fault(STUDENT, 4, 2) is None


def test_every_family_that_is_named_is_there() -> None:
    assert set(SUPPORTED) == set(FAMILIES)
