"""The contrastive batch of an optimizer step: all its queries against all its documents, on all workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from ptrain_embed.labels import Labels
from ptrain_embed.losses import Found
from ptrain_embed.masks import Negatives

if TYPE_CHECKING:
    from ptrain import Batch, Run
    from ptrain_embed.losses import Objective

BLOCK = 2**23
"""Scores that are in memory at a time."""


@dataclass(frozen=True)
class Contrast:
    """What the loss of a whole batch says of the queries and documents of one micro-batch.

    Attributes:
        gradient: fp32 [its queries and documents, d], of the summed loss of the whole batch.
        loss: the summed loss of its queries.
        metrics: by name, a sum over what the loss counts.
    """

    gradient: torch.Tensor
    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Measure:
    """How embeddings are compared.

    Attributes:
        objective: the loss.
        in_batch: whether documents without a label are negatives.
        dimensions: by the number of dimensions that are compared, its weight; they add up to 1.
        normalise: whether what is left of embeddings that are cut gets the length 1 again.
    """

    objective: Objective
    in_batch: bool
    dimensions: Mapping[int, float]
    normalise: bool

    def __call__(
        self, embeddings: torch.Tensor, labels: Labels, rows: range, *, learn: bool = True
    ) -> tuple[torch.Tensor, Found]:
        """The gradient [n + m, d] of the summed loss of some queries of a batch, and their losses.

        Args:
            embeddings: fp32 [n + m, d], each query followed by its documents.
            rows: the queries.
            learn: whether the gradient is wanted; otherwise it is zero.
        """
        leaf = embeddings.detach().requires_grad_(learn)
        negatives, found = Negatives(labels, self.in_batch), {}
        with torch.set_grad_enabled(learn):
            for size, weight in self.dimensions.items():
                found[size] = self._of_size(leaf, size, weight, labels, rows, negatives)
        gradient = torch.zeros_like(embeddings) if leaf.grad is None else leaf.grad
        losses = sum(
            (weight * found[size].losses for size, weight in self.dimensions.items()), start=leaf.new_zeros(())
        )
        return gradient, Found(losses, found[max(found)].metrics)

    def _of_size(
        self, leaf: torch.Tensor, size: int, weight: float, labels: Labels, rows: range, negatives: Negatives
    ) -> Found:
        """The losses of the first `size` dimensions, in blocks; each block's gradient is added before the next."""
        part = self._cut(leaf, size)
        ends = [part[labels.query_positions()], part[labels.document_positions()]]
        held = [one.detach().requires_grad_(leaf.requires_grad) for one in ends]
        blocks = []
        for block in self._blocks(labels, rows):
            one = self.objective(held[0], held[1], labels, block, negatives)
            if leaf.requires_grad:
                (weight * one.losses.sum()).backward()
            blocks.append(Found(one.losses.detach(), one.metrics))
        if leaf.requires_grad:
            torch.autograd.backward(ends, [torch.zeros_like(one) if one.grad is None else one.grad for one in held])
        names = blocks[0].metrics
        return Found(
            torch.cat([one.losses for one in blocks]),
            {name: torch.cat([one.metrics[name] for one in blocks]) for name in names},
        )

    def _cut(self, embeddings: torch.Tensor, size: int) -> torch.Tensor:
        if size >= embeddings.shape[1]:
            return embeddings
        part = embeddings[:, :size]
        return normalize(part, dim=1) if self.normalise else part

    def _blocks(self, labels: Labels, rows: range) -> list[range]:
        """The queries in blocks whose scores fit; at least one, which may be empty."""
        size = max(1, BLOCK // max(labels.documents, labels.queries, 1)) if self.objective.blocks else max(len(rows), 1)
        starts = range(rows.start, rows.stop, size) or [rows.start]
        return [range(start, min(start + size, rows.stop)) for start in starts]


def contrast(
    run: Run, measure: Measure, batches: Sequence[Batch], embeddings: Sequence[torch.Tensor]
) -> list[Contrast]:
    """What the loss of the batch says of each micro-batch of this worker; every worker must ask.

    The batch is all that the workers give. Each computes the losses of its own queries; gradients are added up.

    Args:
        embeddings: of the queries and documents of each micro-batch, [its queries and documents, d], in order.
    """
    learn = run.model.training
    own = Labels.of(batches)
    labels = Labels.unpacked(gathered(run, own.to(run.device).packed()))
    parts = gathered(run, torch.cat([one.detach().float() for one in embeddings]))
    ranks = [len(part) for part in parts]
    begin = sum(ranks[: run.data_rank])
    before = int((labels.query_positions() < begin).sum())
    rows = range(before, before + own.queries)
    gradient, found = measure(torch.cat(parts), labels, rows, learn=learn)
    if learn:
        gradient = added(run, gradient)
    pieces = gradient[begin : begin + ranks[run.data_rank]].split([len(one) for one in embeddings])
    numbers = [batch["rows"] for batch in batches]
    losses = [one.sum() for one in found.losses.split(numbers)]
    metrics = {name: [one.sum() for one in value.split(numbers)] for name, value in found.metrics.items()}
    return [
        Contrast(piece, loss, {name: values[at] for name, values in metrics.items()})
        for at, (piece, loss) in enumerate(zip(pieces, losses, strict=True))
    ]


def gathered(run: Run, values: torch.Tensor) -> list[torch.Tensor]:
    """`values` [x, ...] of every worker that reads other rows, by `data_rank`; x may differ."""
    if run.world == 1:
        return [values]
    import torch.distributed as dist

    mine = torch.tensor([len(values), run.data_rank], device=values.device)
    told = [torch.empty_like(mine) for _ in range(run.world)]
    dist.all_gather(told, mine)
    sizes = [int(size) for size, _ in told]
    padded = values.new_zeros(max(sizes), *values.shape[1:])
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in range(run.world)]
    dist.all_gather(found, padded)
    # Workers that share rows have the same ones: the last of them will do.
    of = {int(rank): part[:size] for (_, rank), size, part in zip(told, sizes, found, strict=True)}
    return [of[rank] for rank in range(run.data_world)]


def added(run: Run, values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over the workers that read other rows."""
    if run.world > 1:
        torch.distributed.all_reduce(values)
        values /= run.world // run.data_world
    return values
