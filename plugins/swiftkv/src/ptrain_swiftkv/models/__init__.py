"""SwiftKV models of each family; importing this makes `AutoConfig` and `AutoModelForCausalLM` know them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from ptrain_swiftkv.models.deepseek_v2 import DeepseekV2SwiftKVForCausalLM
from ptrain_swiftkv.models.llama import LlamaSwiftKVForCausalLM
from ptrain_swiftkv.models.mistral import MistralSwiftKVForCausalLM
from ptrain_swiftkv.models.qwen2 import Qwen2SwiftKVForCausalLM
from ptrain_swiftkv.models.qwen3 import Qwen3SwiftKVForCausalLM
from ptrain_swiftkv.rules import SUFFIX, SUPPORTED

FAMILIES: dict[str, Any] = {}
"""The model class by the `model_type` of what it is made from."""


def register(model: Any) -> None:
    """Make students of another family known: `model` is a subclass of `SwiftKVForCausalLM` with its `config_class`."""
    kind = model.config_class.model_type.removesuffix(SUFFIX)
    FAMILIES[kind] = model
    if kind not in SUPPORTED:
        SUPPORTED.append(kind)
    AutoConfig.register(model.config_class.model_type, model.config_class)
    AutoModelForCausalLM.register(model.config_class, model)


for model in (
    LlamaSwiftKVForCausalLM,
    MistralSwiftKVForCausalLM,
    Qwen2SwiftKVForCausalLM,
    Qwen3SwiftKVForCausalLM,
    DeepseekV2SwiftKVForCausalLM,
):
    register(model)
