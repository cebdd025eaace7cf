"""Llama."""

from __future__ import annotations

from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as llama

from ptrain_swiftkv.models.attention import SharedAttention
from ptrain_swiftkv.models.body import SwiftKVBody, SwiftKVForCausalLM
from ptrain_swiftkv.models.config import SwiftKVConfig


class LlamaSwiftKVConfig(SwiftKVConfig, LlamaConfig):
    """Llama's, and those of SwiftKV."""

    model_type = "llama_swiftkv"


class LlamaSwiftKVAttention(SharedAttention, llama.LlamaAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Of a later layer."""

    rotate = staticmethod(llama.apply_rotary_pos_emb)
    eager = staticmethod(llama.eager_attention_forward)


class LlamaSwiftKVModel(SwiftKVBody, llama.LlamaModel):
    """The body."""

    config_class = LlamaSwiftKVConfig
    attention = LlamaSwiftKVAttention


class LlamaSwiftKVForCausalLM(SwiftKVForCausalLM, llama.LlamaForCausalLM):
    """The language model."""

    config_class = LlamaSwiftKVConfig
    body = LlamaSwiftKVModel
