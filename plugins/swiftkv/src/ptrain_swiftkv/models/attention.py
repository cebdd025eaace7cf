"""Attention of a layer that shares keys and values with others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class SharedAttention(nn.Module):
    """Goes before a family's attention: of a later layer, with projections of its own beside the teacher's."""

    rotate: ClassVar[Any]
    eager: ClassVar[Any]
    if TYPE_CHECKING:  # what a family's attention has
        config: Any
        layer_idx: int
        head_dim: int
        scaling: float
        attention_dropout: float
        q_proj: nn.Linear
        k_proj: nn.Linear
        v_proj: nn.Linear
        o_proj: nn.Linear

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # pyright: ignore[reportCallIssue] - the family's
        self.add_queries()
        if any(layer_idx == group[0] for group in config.groups()):
            self.add_keys_values()

    def add_queries(self) -> None:
        """Make the projections that every later layer has."""
        self.q_proj_swiftkv = like(self.q_proj)

    def add_keys_values(self) -> None:
        """Make the projections that the first layer of a group has."""
        self.k_proj_swiftkv, self.v_proj_swiftkv = like(self.k_proj), like(self.v_proj)

    def queries(self, hidden: torch.Tensor, rope: Any) -> torch.Tensor:
        """[b, heads, s, d], rotated."""
        queries = self._split(self.q_proj_swiftkv(hidden), "q_norm")
        return self.rotate(queries, queries[:, :0], *rope)[0]

    def keys_values(self, hidden: torch.Tensor, rope: Any, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, rotated, and values of the group, [b, heads, s, d] each: what is cached, then those of `hidden`."""
        keys, values = self._split(self.k_proj_swiftkv(hidden), "k_norm"), self._split(self.v_proj_swiftkv(hidden))
        keys = self.rotate(keys[:, :0], keys, *rope)[1]
        return (keys, values) if cache is None else cache.update(keys, values, self.layer_idx)

    def _split(self, projected: torch.Tensor, norm: str = "") -> torch.Tensor:
        heads = projected.unflatten(-1, (-1, self.head_dim))
        return getattr(self, norm, nn.Identity())(heads).transpose(1, 2)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - that of the family, which takes more
        self, hidden_states: torch.Tensor, shared: tuple[torch.Tensor, torch.Tensor] | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With `shared`, the keys and values of the group, attention of the layer's own queries to them."""
        if shared is None:
            return super().forward(hidden_states=hidden_states, **kwargs)
        queries = self.queries(hidden_states, kwargs.pop("position_embeddings"))
        mask, _ = kwargs.pop("attention_mask"), kwargs.pop("past_key_values", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        dropout = self.attention_dropout if self.training else 0.0
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        made, weights = attend(
            self, queries, *shared, mask, dropout=dropout, scaling=self.scaling, sliding_window=window, **kwargs
        )
        return self.o_proj(made.flatten(2).contiguous()), weights


def like(linear: Any) -> nn.Linear:
    """A new linear layer of the same size."""
    return nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
