"""Attention of all documents of a batch in one kernel, for GPUs: `ptrain_varlen`, and what flash attention needs.

Document by document, a packed row of 8,192 tokens is dozens of small kernels a layer; a kernel for sequences of any
length takes the whole batch as one flat row and the places where documents begin. Those are built once a batch, on
the host: found on the device, from position ids, they would make the host wait for the device in every layer. (And
transformers looks at position ids in batches of one row alone; with several, documents would see each other.)
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptrain.model.attention import NAME, Documents, is_causal, plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ptrain.results import Batch

VARLEN = "ptrain_varlen"
DTYPES = (torch.bfloat16, torch.float16)
"""That flash kernels compute in."""
LARGEST_HEAD = 256
"""The most numbers a head of flash attention can have."""


def document_arguments(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What the attention of `model` is told of the documents of a batch, as keyword arguments of its body."""
    name = plain_name(model.config._attn_implementation)
    lengths = batch["document_lengths"]
    found: dict[str, Any] = {"document_lengths": Documents(lengths)} if name in (NAME, VARLEN) else {}
    if name == VARLEN or (str(name).startswith("flash_attention") and model._supports_attention_backend):
        size = batch.get("row_length", batch["input_ids"].shape[1])
        found.update(boundaries(lengths, size, batch["input_ids"].device))
    return found


def boundaries(document_lengths: list[list[int]], size: int, device: torch.device) -> dict[str, Any]:
    """Where documents begin in the rows laid end to end, in the words of transformers' flash attention.

    The padding of a row is a document of its own, so that nothing has to be gathered: nobody reads what becomes of it.

    Args:
        document_lengths: of each row, without padding.
        size: of each row, with it.
    """
    lengths = [n for row in document_lengths for n in (*row, size - sum(row)) if n]
    # Not `torch.tensor(..., device=...)`, which waits until the device is idle.
    begins = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [b, heads, s, d] queries; returns [b, s, heads, d] like transformers' functions do.

    A layer that the kernel can't compute is left to `ptrain_sdpa`, document by document.
    """
    if cu_seq_lens_q is None or max_length_q is None or not _fits(query, value, kwargs):
        plain = ALL_ATTENTION_FUNCTIONS[NAME]
        return plain(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    # The kernel counts the tokens on either side, transformers the token itself too.
    near = -1 if sliding_window is None else sliding_window - 1
    out: Any = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=kwargs.get("scaling"),
        window_size=(near, 0 if is_causal(module, kwargs) else near),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def _fits(query: torch.Tensor, value: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether torch's kernel computes what is asked for: without dropout, bias or cap, heads of one size."""
    size = query.shape[3]
    return (
        query.dtype in DTYPES
        and size == value.shape[3] <= LARGEST_HEAD
        and size % 8 == 0
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
    )


AttentionInterface.register(VARLEN, _attention)
AttentionMaskInterface.register(VARLEN, ALL_MASK_ATTENTION_FUNCTIONS[NAME])
