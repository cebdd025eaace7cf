"""Qwen3: queries and keys are normed."""

from __future__ import annotations

from transformers import Qwen3Config
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from ptrain_swiftkv.models.attention import SharedAttention
from ptrain_swiftkv.models.body import SwiftKVBody, SwiftKVForCausalLM
from ptrain_swiftkv.models.config import SwiftKVConfig


class Qwen3SwiftKVConfig(SwiftKVConfig, Qwen3Config):
    """Qwen3's, and those of SwiftKV."""

    model_type = "qwen3_swiftkv"


class Qwen3SwiftKVAttention(SharedAttention, qwen3.Qwen3Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Of a later layer."""

    rotate = staticmethod(qwen3.apply_rotary_pos_emb)
    eager = staticmethod(qwen3.eager_attention_forward)


class Qwen3SwiftKVModel(SwiftKVBody, qwen3.Qwen3Model):
    """The body."""

    config_class = Qwen3SwiftKVConfig
    attention = Qwen3SwiftKVAttention


class Qwen3SwiftKVForCausalLM(SwiftKVForCausalLM, qwen3.Qwen3ForCausalLM):
    """The language model."""

    config_class = Qwen3SwiftKVConfig
    body = Qwen3SwiftKVModel
