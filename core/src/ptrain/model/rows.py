"""What the body of a model is called with: rows of documents as they are, or each document in a row of its own."""

from __future__ import annotations

import inspect
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ptrain.model.attention import NAME, TRACED, plain_name
from ptrain.model.varlen import VARLEN, document_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ptrain.results import Batch


def one_a_row(model: PreTrainedModel) -> bool:
    """Whether documents need rows of their own: nothing else keeps them apart in this attention.

    That is so in bodies without an output layer whose attention is not ptrain's, such as encoders with positions that
    are relative or disentangled. Language models are refused where they don't keep documents apart (`check_apart`).
    """
    name = str(plain_name(model.config._attn_implementation))
    known = name in (NAME, VARLEN, TRACED) or (name.startswith("flash_attention") and model._supports_attention_backend)
    return not known and not model.can_generate()


def body_arguments(model: PreTrainedModel, batch: Batch, *, apart: bool) -> dict[str, Any]:
    """The keyword arguments of the body of `model` for a batch.

    Args:
        apart: each document gets a row of its own, padded on the right.
    """
    if not apart:
        positions = batch["position_ids"] + first_position(model)
        arguments = {**document_arguments(model, batch), **batch.get("attention_arguments", {})}
        return {"input_ids": batch["input_ids"], "position_ids": positions, "use_cache": False, **arguments}
    places, inside = _places(batch)
    ids = batch["input_ids"].flatten()[places]
    arguments = {"input_ids": ids, "attention_mask": inside.long()}
    taken = inspect.signature(model.base_model.forward).parameters
    return {**arguments, "use_cache": False} if "use_cache" in taken else arguments


def in_rows(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What came of documents in rows of their own, [n, l, ...], where they are in the batch: [b, s, ...]."""
    places, inside = _places(batch)
    ids = batch["input_ids"]
    found = hidden.new_zeros(ids.numel(), *hidden.shape[2:])
    return found.index_put((places[inside],), hidden[inside]).unflatten(0, ids.shape)


def _places(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens of each document are in the rows end to end, int64 [n, l], and which of them there are, bool."""
    ids = batch["input_ids"]
    rows = batch["document_lengths"]
    begins = [row * ids.shape[1] + at for row, counts in enumerate(rows) for at in accumulate([0, *counts[:-1]])]
    lengths = torch.tensor([count for counts in rows for count in counts], device=ids.device)[:, None]
    steps = torch.arange(int(lengths.max()), device=ids.device)
    inside = steps < lengths
    return torch.tensor(begins, device=ids.device)[:, None] + torch.where(inside, steps, 0), inside


def first_position(model: PreTrainedModel) -> int:
    """The position of the first token of a document: RoBERTa and its like begin after that of padding."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def learns_positions(model: PreTrainedModel) -> bool:
    """Whether `model` has learnt a vector for each position, so that there are no further ones."""
    names = (name.lower() for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    return any("pos" in name or name.endswith("wpe") for name in names)
