"""Ulysses attention: each worker computes some heads over whole rows, with whatever the model computes attention with.

Outside the heads, in projections, MLPs and the loss, a worker has its own positions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ptrain import ModelError
from ptrain.attention import Attention, attention_name, seen, wrap_attention
from ptrain_sequence_parallel import exchange

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ptrain_sequence_parallel.groups import Group

FLEX = "flex_attention"


def exchange_heads(model: PreTrainedModel) -> None:
    """Have `model` exchange heads round its attention, where a batch says so (`Cut`).

    Raises:
        ModelError: it computes attention in a way of its own.
    """
    wrap_attention(model, "ulysses", partial(_around, flex=attention_name(model) == FLEX))


def _around(plain: Attention, flex: bool) -> Attention:
    """`plain` for whole rows, or with the exchange round it where the keyword `ulysses` comes with a call."""

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        ulysses: Cut | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        if ulysses is None:
            return plain(module, query, key, value, attention_mask, **kwargs)
        mask = ulysses.block_mask(kwargs.get("sliding_window"), query.device) if flex else None
        return _exchanged(plain, ulysses.group, module, query, key, value, mask, kwargs)

    return attention


def _exchanged(
    plain: Attention, group: Group, module: Any, query: Any, key: Any, value: Any, mask: Any, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, None]:
    """Attention of this worker's positions, [b, s / size, heads, d]."""
    heads, own = query.shape[1], query.shape[1] // group.size
    times = exchange.repeats(heads, key.shape[1], group.size)
    if times > 1:
        key, value = (tensor.repeat_interleave(times, dim=1) for tensor in (key, value))
    q, k, v = exchange.to_heads(group, query, key, value)
    local = seen(module, num_key_value_groups=own // k.shape[1])
    out, _ = plain(local, q, k, v, mask, **_of_heads(kwargs, group, heads))
    (back,) = exchange.to_positions(group, out.transpose(1, 2))
    return back.transpose(1, 2), None


def _of_heads(kwargs: dict[str, Any], group: Group, heads: int) -> dict[str, Any]:
    """The keywords of an attention function, as they are for the heads of this worker and for all positions."""
    if kwargs.get("position_bias") is not None:
        raise ModelError(
            "the model adds a bias to its attention that depends on positions, which are cut up here",
            fix="train it without `sequence-parallel`, or with `size: 1`",
        )
    kept = {name: value for name, value in kwargs.items() if name != "position_ids"}
    if kept.get("s_aux") is not None:  # sinks, one a head
        kept["s_aux"] = kept["s_aux"].chunk(group.size)[group.rank]
    return kept


class Cut:
    """What attention has to know of a batch whose rows are cut up: who has the rest, and where documents end.

    Attributes:
        group: the workers that have its parts.
        document_lengths: of each whole row, without padding.
        row_length: of a whole row, with padding.
    """

    def __init__(self, group: Group, document_lengths: Sequence[Sequence[int]], row_length: int) -> None:
        self.group, self.document_lengths, self.row_length = group, document_lengths, row_length
        self._masks: dict[int | None, Any] = {}

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """The mask of flex attention for whole rows, made once a batch: causal, within documents and the window."""
        if window not in self._masks:
            from torch.nn.attention.flex_attention import create_block_mask

            documents = self._documents().to(device)

            def sees(b: Any, h: Any, q: Any, kv: Any) -> Any:
                seen = (q >= kv) & (documents[b, q] == documents[b, kv])
                return seen if window is None else seen & (q - kv < window)

            rows, length = documents.shape
            self._masks[window] = create_block_mask(
                sees, rows, None, length, length, device=str(device), _compile=device.type != "cpu"
            )
        return self._masks[window]

    def _documents(self) -> torch.Tensor:
        """Which document of its row each position belongs to, int64 [b, s]; padding is one of its own."""
        found = []
        for lengths in self.document_lengths:
            whole = torch.tensor([*lengths, self.row_length - sum(lengths)])
            found.append(torch.arange(len(whole)).repeat_interleave(whole))
        return torch.stack(found)
