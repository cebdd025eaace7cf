"""What each head is given and what it is to say, at every position of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptrain import Batch

TOKENS, LABELS = "ahead_tokens", "ahead_labels"
IGNORED = -100


def with_targets(batch: Batch, heads: int) -> Batch:
    """`batch` with two more tensors, int64 [b, s, heads].

    At position t, whose next token is the base's own to say, head i is advanced with token t + 1 + i
    (`ahead_tokens`) and is to say token t + 2 + i (`ahead_labels`): -100 where that is of another document than
    token t, or not supervised.
    """
    import torch

    ids, labels, documents = batch["input_ids"], batch["shift_labels"], batch["document_ids"]
    tokens, targets = [], []
    for distance in range(1, heads + 1):
        inside = _ahead(documents, distance, -1) == documents
        tokens.append(_ahead(ids, distance, 0))
        targets.append(_ahead(labels, distance, IGNORED).masked_fill(~inside, IGNORED))
    return {**batch, TOKENS: torch.stack(tokens, dim=-1), LABELS: torch.stack(targets, dim=-1)}


def _ahead(values: Any, distance: int, filling: int) -> Any:
    """`values` [b, s], of which each stands `distance` places before where it was."""
    from torch.nn.functional import pad

    return pad(values[:, distance:], (0, min(distance, values.shape[1])), value=filling)
