"""Qwen2 and Qwen2.5: with biases, and in some models later layers with a window."""

from __future__ import annotations

from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from ptrain_swiftkv.models.attention import SharedAttention
from ptrain_swiftkv.models.body import SwiftKVBody, SwiftKVForCausalLM
from ptrain_swiftkv.models.config import SwiftKVConfig


class Qwen2SwiftKVConfig(SwiftKVConfig, Qwen2Config):
    """Qwen2's, and those of SwiftKV."""

    model_type = "qwen2_swiftkv"


class Qwen2SwiftKVAttention(SharedAttention, qwen2.Qwen2Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Of a later layer."""

    rotate = staticmethod(qwen2.apply_rotary_pos_emb)
    eager = staticmethod(qwen2.eager_attention_forward)


class Qwen2SwiftKVModel(SwiftKVBody, qwen2.Qwen2Model):
    """The body."""

    config_class = Qwen2SwiftKVConfig
    attention = Qwen2SwiftKVAttention


class Qwen2SwiftKVForCausalLM(SwiftKVForCausalLM, qwen2.Qwen2ForCausalLM):
    """The language model."""

    config_class = Qwen2SwiftKVConfig
    body = Qwen2SwiftKVModel
