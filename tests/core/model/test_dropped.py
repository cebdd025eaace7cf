"""Attention with dropout, beside the same written out for autograd with the probabilities that were dropped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ptrain.model import dropped

SEES: dict[str, Any] = {
    "all": None,
    "what is before": torch.ones(6, 6, dtype=torch.bool).tril(),
    "no padding": (torch.arange(6) < torch.tensor([6, 4, 1])[:, None])[:, None, None, :],
}


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize(("heads", "share", "scale"), [(4, 0.5, None), (2, 0.1, 0.3), (1, 0.9, None)])
def test_value_and_gradients_are_those_of_autograd(sees: str, heads: int, share: float, scale: float | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 4, 6, 5, requires_grad=True)
    key, value = (torch.randn(3, heads, 6, 5, requires_grad=True) for _ in range(2))
    weights = torch.randn(3, 4, 6, 5)
    torch.manual_seed(1)
    found = dropped.attention(query, key, value, SEES[sees], share, scale)
    torch.manual_seed(1)
    keep, more = dropped.kept(torch.Size([3, 4, 6, 6]), share)
    assert more == pytest.approx(1 / (1 - share), rel=1e-3) and not keep.all()
    wide_key, wide_value = (tensor.repeat_interleave(4 // heads, 1) for tensor in (key, value))
    scores = query.double() @ wide_key.double().transpose(-2, -1) * (1 / math.sqrt(5) if scale is None else scale)
    seen = torch.ones(6, 6, dtype=torch.bool) if SEES[sees] is None else SEES[sees]
    wanted = (scores.masked_fill(~seen, -torch.inf).softmax(-1) * keep * more) @ wide_value.double()
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    inputs = (query, key, value)
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.003])
def test_so_many_are_dropped_and_each_by_itself(share: float) -> None:
    """The share of all, of each of the four that one draw gives, and of neighbours both."""
    torch.manual_seed(0)
    size = torch.Size([1000, 1001])
    keep, more = dropped.kept(size, share)
    gone = ~keep.flatten()[:1_000_000]
    assert more == pytest.approx(1 / (1 - share), rel=1e-4)
    for part in (gone, *gone.view(-1, 4).T):
        assert part.float().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share / len(part)))
    both = (gone[1:] & gone[:-1]).float().mean().item()
    assert both == pytest.approx(share**2, abs=5 * math.sqrt(share**2 / len(gone)))
    torch.manual_seed(0)
    assert torch.equal(dropped.kept(size, share)[0], keep)
