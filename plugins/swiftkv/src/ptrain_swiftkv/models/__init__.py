"""SwiftKV models of each family; importing this makes `AutoConfig` and `AutoModelForCausalLM` know them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from ptrain_swiftkv.models.deepseek_v2 import DeepseekV2SwiftKVForCausalLM
from ptrain_swiftkv.models.llama import LlamaSwiftKVForCausalLM
from ptrain_swiftkv.models.mistral import MistralSwiftKVForCausalLM
from ptrain_swiftkv.models.qwen2 import Qwen2SwiftKVForCausalLM
from ptrain_swiftkv.models.qwen3 import Qwen3SwiftKVForCausalLM

MODELS: tuple[Any, ...] = (
    LlamaSwiftKVForCausalLM,
    MistralSwiftKVForCausalLM,
    Qwen2SwiftKVForCausalLM,
    Qwen3SwiftKVForCausalLM,
    DeepseekV2SwiftKVForCausalLM,
)
FAMILIES = {model.config_class.model_type.removesuffix("_swiftkv"): model for model in MODELS}
"""The model class by the `model_type` of what it is made from."""

for model in MODELS:
    AutoConfig.register(model.config_class.model_type, model.config_class)
    AutoModelForCausalLM.register(model.config_class, model)
