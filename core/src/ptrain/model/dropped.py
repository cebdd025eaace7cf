"""Attention with dropout on a CPU, where torch has no kernel for it and keeps three fp32 numbers of each score.

Here one byte of each is kept, whether it was dropped; the rest is computed again in the backward pass, for one more
product and softmax. Random bits are drawn 64 at a time. A step of 128 pairs with MiniLM takes 0.70 of the memory and
0.93 of the time (docs/explanation/performance.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

LEVELS = 1 << 16
"""A share of dropout is rounded to a multiple of 1/65,536; what is left is scaled by the share that was rounded."""


def fits(query: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether this is meant for attention with these arguments of transformers' functions."""
    return (
        0 < (kwargs.get("dropout") or 0) < 1
        and query.device.type == "cpu"
        and query.dtype == torch.float32
        and all(kwargs.get(name) is None for name in ("position_bias", "softcap", "cache"))
    )


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, share: float,
    scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """softmax(scale * Q K^T) with a share of it dropped, times V: fp32 [n, heads, s, d], as torch's own function is.

    Args:
        query: fp32 [n, heads, s, d]; `key` and `value` may have fewer heads, each for as many of the query's.
        mask: bool, of a shape that fits [n, heads, s, s]: what is seen; None is all. A token sees something.
        share: of the probabilities, between 0 and 1.
        scale: by default 1/sqrt(d).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    return _Dropped.apply(query, key, value, mask, share, query.shape[-1] ** -0.5 if scale is None else scale)


def kept(shape: torch.Size, share: float) -> tuple[torch.Tensor, float]:
    """What is not dropped, bool, drawn from torch's generator; and by how much that is scaled."""
    below = min(round(share * LEVELS), LEVELS - 1)
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[:count].view(shape) >= below - LEVELS // 2, LEVELS / (LEVELS - below)


def _probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = torch.matmul(query, key.transpose(-2, -1)).mul_(scale)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, share: float,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        found = _probabilities(query, key, mask, scale)
        keep, more = kept(found.shape, share)
        ctx.save_for_backward(query, key, value, mask, keep)
        ctx.scale, ctx.more = scale, more
        return torch.matmul(found.mul_(keep), value).mul_(more)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        query, key, value, mask, keep = ctx.saved_tensors
        found = _probabilities(query, key, mask, ctx.scale)
        gradient = gradient * ctx.more
        of_value = torch.matmul((found * keep).transpose(-2, -1), gradient)
        of_found = torch.matmul(gradient, value.transpose(-2, -1)).mul_(keep)
        of_scores = torch.ops.aten._softmax_backward_data(of_found, found, -1, found.dtype).mul_(ctx.scale)
        of_query, of_key = torch.matmul(of_scores, key), torch.matmul(of_scores.transpose(-2, -1), query)
        return of_query, of_key, of_value, None, None, None
