"""Small teachers of every family, and their students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ptrain_swiftkv.models import FAMILIES
from ptrain_swiftkv.student import begin, student_config

SMALL = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "head_dim": 8,
}  # fmt: skip
"""Weights so large that layers make a difference."""
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4},
    "qwen3": {},
    "deepseek_v2": {
        "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "deepseek_v2 lite": {"q_lora_rank": None},
}  # fmt: skip
LAYOUTS = [(6, 1), (5, 1), (3, 1), (2, 2)]
"""`num_key_value_layers` and `key_value_group_size`."""


def teacher(family: str, **keys: Any) -> Any:
    """A model with random weights, also where they begin as constants (norms and biases)."""
    kind, _, variant = family.partition(" ")
    own = {k: v for k, v in SMALL.items() if k != "head_dim" or kind in ("llama", "mistral", "qwen3")}
    config = AutoConfig.for_model(kind, **{**own, **OWN[kind], **(OWN[family] if variant else {}), **keys})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def student(model: Any, kept: int, size: int, *, moved: float = 0.0) -> Any:
    """A student of `model` as it begins, or with its own weights moved at random by so much."""
    made = FAMILIES[model.config.model_type](student_config(model.config, kept, size)).eval()
    result = made.load_state_dict(model.state_dict(), strict=False)
    assert not result.unexpected_keys and all("_swiftkv." in name for name in result.missing_keys)
    begin(made)
    made.to(model.dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "_swiftkv." in name:
                parameter.add_(moved * torch.randn_like(parameter))
    return made


def make_teacher(tiny_model: Path, folder: Path) -> Path:
    """Fill `folder` with a Llama of four layers, whose weights are larger than usual, and the tiny model's tokenizer."""
    config = AutoConfig.from_pretrained(tiny_model, num_hidden_layers=4, initializer_range=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def ids(rows: int = 2, length: int = 13) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(3, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))
