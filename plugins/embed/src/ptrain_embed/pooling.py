"""From the hidden states of a text's tokens to one vector."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from ptrain import Batch

Pooling = Literal["cls", "last", "mean"]
"""The first token of a text, its last one, or the mean of all."""


def pool(hidden: torch.Tensor, batch: Batch, how: Pooling) -> torch.Tensor:
    """One vector for each document of a batch, row by row: [n, h].

    Means are taken in fp32. A micro-batch without rows gives [0, h], through which gradients still flow.

    Args:
        hidden: [b, s, h].
        batch: with the `document_lengths` of its rows; what lies behind them is padding.
    """
    import torch

    rows, size = batch["document_lengths"] if batch["rows"] else [], hidden.shape[1]
    begins = [row * size + at for row, counts in enumerate(rows) for at in accumulate([0, *counts[:-1]])]
    lengths = [count for counts in rows for count in counts]
    flat = hidden.flatten(0, 1)
    if how == "mean":
        return _means(flat, batch["document_ids"].flatten() >= 0, begins, lengths).to(hidden.dtype)
    places = begins if how == "cls" else [at + count - 1 for at, count in zip(begins, lengths, strict=True)]
    return flat[torch.tensor(places, dtype=torch.int64).to(flat.device, non_blocking=True)]


def _means(flat: torch.Tensor, inside: torch.Tensor, begins: list[int], lengths: list[int]) -> torch.Tensor:
    """Of tokens [t, h]; a document and the padding behind it reach up to the next one. fp32 [n, h]."""
    import torch

    spans = [end - at for at, end in zip(begins, [*begins[1:], len(flat)], strict=True)] if begins else []
    numbers = torch.arange(len(spans)).repeat_interleave(torch.tensor(spans, dtype=torch.int64))
    states = flat[: len(numbers)].float().masked_fill(~inside[: len(numbers), None], 0)
    sums = states.new_zeros(len(spans), flat.shape[1]).index_add(0, numbers.to(flat.device, non_blocking=True), states)
    return sums / torch.tensor(lengths, dtype=torch.float32).to(flat.device, non_blocking=True)[:, None]
