"""What a recipe changes of a model's configuration (`model.hf_config_kwargs`)."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ptrain.model.huggingface import HuggingFaceModel

SMALL: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("layers", [1, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "smollm3"])
def test_another_number_of_layers(family: str, layers: int, tmp_path: Path) -> None:
    """Also where the configuration lists the kinds of its layers."""
    AutoConfig.for_model(family, **SMALL, num_hidden_layers=4).save_pretrained(tmp_path / "base")
    keys = {"name_or_path": str(tmp_path / "base"), "hf_config_kwargs": {"num_hidden_layers": layers}}
    part = HuggingFaceModel(HuggingFaceModel.Config.model_validate(keys))
    run: Any = SimpleNamespace()
    config = part.create_config(run)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    assert len(model.base_model.layers) == layers
    model.save_pretrained(tmp_path / "made")
    assert AutoConfig.from_pretrained(tmp_path / "made").num_hidden_layers == layers
