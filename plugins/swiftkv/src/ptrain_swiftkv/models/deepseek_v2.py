"""DeepSeek-V2: multi-head latent attention, of which latents are cached, not keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV2Config
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek

from ptrain_swiftkv.models.attention import SharedAttention, like
from ptrain_swiftkv.models.body import SwiftKVBody, SwiftKVForCausalLM
from ptrain_swiftkv.models.config import SwiftKVConfig


class DeepseekV2SwiftKVConfig(SwiftKVConfig, DeepseekV2Config):
    """DeepSeek-V2's, and those of SwiftKV."""

    model_type = "deepseek_v2_swiftkv"


class DeepseekV2SwiftKVAttention(SharedAttention, deepseek.DeepseekV2Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Of a later layer."""

    rotate = staticmethod(deepseek.apply_rotary_emb)
    eager = staticmethod(deepseek.eager_attention_forward)

    def add_queries(self) -> None:
        """Make the projections that every later layer has."""
        if self.q_lora_rank is None:
            self.q_proj_swiftkv = like(self.q_proj)
        else:
            self.q_a_proj_swiftkv, self.q_b_proj_swiftkv = like(self.q_a_proj), like(self.q_b_proj)
            self.q_a_layernorm_swiftkv = deepseek.DeepseekV2RMSNorm(self.q_lora_rank)

    def add_keys_values(self) -> None:
        """Make the projections that the first layer of a group has."""
        self.kv_a_proj_with_mqa_swiftkv = like(self.kv_a_proj_with_mqa)
        self.kv_a_layernorm_swiftkv = deepseek.DeepseekV2RMSNorm(self.kv_lora_rank)
        self.kv_b_proj_swiftkv = like(self.kv_b_proj)

    def queries(self, hidden: torch.Tensor, rope: Any) -> torch.Tensor:
        """[b, heads, s, d], of which the last `qk_rope_head_dim` numbers are rotated."""
        if self.q_lora_rank is None:
            projected = self.q_proj_swiftkv(hidden)
        else:
            projected = self.q_b_proj_swiftkv(self.q_a_layernorm_swiftkv(self.q_a_proj_swiftkv(hidden)))
        heads = projected.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        plain, turned = heads.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return torch.cat([plain, self.rotate(turned, turned[:, :1], rope)[0]], dim=-1)

    def keys_values(self, hidden: torch.Tensor, rope: Any, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the group, [b, heads, s, d] each, expanded from latents: what is cached, then new ones."""
        latent, turned = self.kv_a_proj_with_mqa_swiftkv(hidden)[:, None].split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        latent, turned = self.kv_a_layernorm_swiftkv(latent), self.rotate(turned, turned, rope)[1]
        if cache is not None:
            latent, turned = cache.update(latent, turned, self.layer_idx)
        heads = self.kv_b_proj_swiftkv(latent[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        plain, values = heads.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([plain, turned.expand(-1, self.num_heads, -1, -1)], dim=-1), values


class DeepseekV2SwiftKVModel(SwiftKVBody, deepseek.DeepseekV2Model):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The body."""

    config_class = DeepseekV2SwiftKVConfig
    attention = DeepseekV2SwiftKVAttention
    output = MoeModelOutputWithPast


class DeepseekV2SwiftKVForCausalLM(SwiftKVForCausalLM, deepseek.DeepseekV2ForCausalLM):
    """The language model."""

    config_class = DeepseekV2SwiftKVConfig
    body = DeepseekV2SwiftKVModel
