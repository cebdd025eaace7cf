"""From the hidden states of a text's tokens to one vector."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from ptrain import Batch, Run

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


def pool_parts(run: Run, hidden: torch.Tensor, batch: Batch, how: Pooling) -> torch.Tensor:
    """The same where a text may lie on several workers: its vector is a sum, which goes through `sequence_sum`.

    Args:
        hidden: [b, s, h], of this worker's positions.
        batch: with `document_ids` and `position_ids` of these, and the `document_lengths` of whole rows.
    """
    import torch

    rows = batch["document_lengths"] if batch["rows"] else []
    lengths = torch.tensor([count for counts in rows for count in counts], device=hidden.device)
    if not len(lengths):
        return hidden.flatten(0, 1)[:0]
    before = torch.tensor([0, *accumulate(map(len, rows[:-1]))], device=hidden.device)[:, None]
    inside = batch["document_ids"] >= 0
    texts = (batch["document_ids"] + before).masked_fill(~inside, -1)
    if how != "mean":
        place = 0 if how == "cls" else lengths[texts] - 1
        texts = texts.masked_fill(batch["position_ids"] != place, -1)
    sums = run.call("sequence_sum", values=hidden, segment_ids=texts)
    return (sums / lengths[:, None] if how == "mean" else sums).to(hidden.dtype)
