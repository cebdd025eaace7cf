"""Mistral: all layers may look no further back than a window."""

from __future__ import annotations

from transformers import MistralConfig
from transformers.models.mistral import modeling_mistral as mistral

from ptrain_swiftkv.models.attention import SharedAttention
from ptrain_swiftkv.models.body import SwiftKVBody, SwiftKVForCausalLM
from ptrain_swiftkv.models.config import SwiftKVConfig


class MistralSwiftKVConfig(SwiftKVConfig, MistralConfig):
    """Mistral's, and those of SwiftKV."""

    model_type = "mistral_swiftkv"


class MistralSwiftKVAttention(SharedAttention, mistral.MistralAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Of a later layer."""

    rotate = staticmethod(mistral.apply_rotary_pos_emb)
    eager = staticmethod(mistral.eager_attention_forward)


class MistralSwiftKVModel(SwiftKVBody, mistral.MistralModel):
    """The body."""

    config_class = MistralSwiftKVConfig
    attention = MistralSwiftKVAttention


class MistralSwiftKVForCausalLM(SwiftKVForCausalLM, mistral.MistralForCausalLM):
    """The language model."""

    config_class = MistralSwiftKVConfig
    body = MistralSwiftKVModel
