"""What models of every family have in common whose later layers share keys and values (SwiftKV).

Qiao et al., "SwiftKV: Fast Prefill-Optimized Inference with Knowledge-Preserving Model Transformation" (2024). The
first `num_key_value_layers` layers are ordinary. What comes out of them is normed (`norm_swiftkv`), and the keys and
values of all later layers are made of that, once for each group of `key_value_group_size` layers; queries are made by
projections of their own (`q_proj_swiftkv`). So a prompt needs no later layer but at its last token. With
`config.swiftkv` false it is the model that it was made from: one set of weights is teacher and student.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ptrain_swiftkv.models.attention import SharedAttention


@dataclass
class Trunk:
    """What the ordinary layers leave behind: hidden states [b, s, h], and what the later layers are given with them."""

    ids: torch.Tensor | None
    hidden: torch.Tensor
    rope: Any
    masks: Any
    position_ids: torch.Tensor
    cache: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    def last(self) -> Trunk:
        """The same of the last position alone, with keys of all of them; all of it where its masks can't be cut."""
        if not all(mask is None or isinstance(mask, torch.Tensor) for mask in _each(self.masks)):
            return self  # flex attention has masks of blocks
        rope = tuple(r[:, -1:] for r in self.rope) if isinstance(self.rope, tuple) else self.rope[:, -1:]
        return Trunk(
            self.ids, self.hidden[:, -1:], rope, _rows(self.masks), self.position_ids[:, -1:], self.cache, self.extra
        )


def _each(masks: Any) -> list[Any]:
    return list(masks.values()) if isinstance(masks, dict) else [masks]


def _rows(masks: Any) -> Any:
    """The last row of masks [b, 1, q, k]; others have none."""
    if isinstance(masks, dict):
        return {name: _rows(mask) for name, mask in masks.items()}
    return masks[:, :, -1:] if isinstance(masks, torch.Tensor) and masks.ndim == 4 else masks


class SwiftKVBody(PreTrainedModel):
    """Goes before a family's body: ordinary layers, then later ones, which share keys and values."""

    attention: ClassVar[type[SharedAttention]]
    output: ClassVar[Any] = BaseModelOutputWithPast
    if TYPE_CHECKING:  # what a family's body has
        config: Any
        embed_tokens: nn.Embedding
        layers: Any
        norm: nn.Module
        rotary_emb: nn.Module
    reusing = False
    """Whether a pass over the same tokens takes the ordinary layers from the pass before."""
    _before: Trunk | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        norm: Any = type(self.norm)
        self.norm_swiftkv = norm(config.hidden_size, eps=config.rms_norm_eps)
        for at in range(config.kept, config.num_hidden_layers):
            self.layers[at].self_attn = self.attention(config, at)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        last_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Hidden states after the final norm; arguments as transformers has them.

        Args:
            last_only: of the last position alone, [b, 1, h]; the later layers do nothing for the others but keys and
                values.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        trunk = self._before
        if trunk is None or input_ids is None or trunk.ids is not input_ids or past_key_values is not None:
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            trunk = self._ordinary(input_ids, embeds, attention_mask, position_ids, past_key_values, kwargs)
        self._before = trunk if self.reusing else None
        hidden = self._sharing(trunk, last_only) if self.config.swiftkv else self._later(trunk)
        return self.output(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def _ordinary(
        self, ids: Any, embeds: torch.Tensor, mask: Any, positions: Any, cache: Any, extra: dict[str, Any]
    ) -> Trunk:
        if positions is None:
            seen = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None] + seen
        masks = mask
        if not isinstance(mask, dict):  # generation has made them already, of a cache of fixed size
            masks = create_masks_for_generate(
                self.config, embeds, attention_mask=mask, past_key_values=cache, position_ids=positions
            )
        rope = self.rotary_emb(embeds, position_ids=positions)
        trunk = Trunk(ids, embeds, rope, masks, positions, cache, extra)
        for at in range(self.config.kept):
            trunk.hidden = self._layer(at, trunk.hidden, trunk)
        return trunk

    def _later(self, trunk: Trunk) -> torch.Tensor:
        """As the teacher does it."""
        hidden = trunk.hidden
        for at in range(self.config.kept, self.config.num_hidden_layers):
            hidden = self._layer(at, hidden, trunk)
        return hidden

    def _sharing(self, trunk: Trunk, last_only: bool) -> torch.Tensor:
        """As the student does it."""
        source = self.norm_swiftkv(trunk.hidden)
        late = trunk.last() if last_only else trunk
        # With all layers kept there is nothing to learn: a gradient of zeros, as others have one.
        hidden = late.hidden if any(self.config.groups()) else late.hidden + 0.0 * source[:, -late.hidden.shape[1] :]
        for group in self.config.groups():
            shared = self.layers[group[0]].self_attn.keys_values(source, trunk.rope, trunk.cache)
            for at in group:
                hidden = self._layer(at, hidden, late, shared=shared)
        return hidden

    def _layer(self, at: int, hidden: torch.Tensor, trunk: Trunk, **more: Any) -> torch.Tensor:
        masks = trunk.masks
        return self.layers[at](
            hidden,
            attention_mask=masks[self.config.layer_types[at]] if isinstance(masks, dict) else masks,
            position_embeddings=trunk.rope,
            position_ids=trunk.position_ids,
            past_key_values=trunk.cache,
            **trunk.extra,
            **more,
        )


class SwiftKVForCausalLM(PreTrainedModel):
    """Goes before a family's causal language model."""

    body: ClassVar[type[SwiftKVBody]]

    def __init__(self, config: Any) -> None:
        # That of the family would make its own body first.
        PreTrainedModel.__init__(self, config)
        self.model = self.body(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the family has it; where the last token's logits alone are asked for, later layers see no other."""
        everything = labels is not None or kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        if isinstance(logits_to_keep, int) and logits_to_keep == 1 and not everything:
            kwargs["last_only"] = True
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip


@contextmanager
def as_teacher(model: Any) -> Iterator[None]:
    """Within it, `model` is the one that it was made from: no dropout, and layers with keys and values of their own."""
    mode, before = model.training, model.config.swiftkv
    model.config.swiftkv = False
    model.eval()
    try:
        yield
    finally:
        model.config.swiftkv = before
        model.train(mode)


@contextmanager
def reusing_trunk(model: Any) -> Iterator[None]:
    """Within it, a second pass over the same tokens takes what the ordinary layers made from the first."""
    body = model.base_model
    body.reusing = True
    try:
        yield
    finally:
        body.reusing, body._before = False, None
