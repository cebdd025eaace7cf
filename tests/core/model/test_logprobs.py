"""Log-probabilities of labels against autograd's own, whole and in tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptrain.model.logprobs import token_logprobs

VOCABULARY = 23


@pytest.fixture
def made() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A head, hidden states [3, 7, 5] and labels, some of which are none."""
    drawn = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(5, VOCABULARY, dtype=torch.float64)
    hidden = torch.randn(3, 7, 5, generator=drawn, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (3, 7), generator=drawn)
    labels[0, :3] = labels[2] = -100
    return head, hidden, labels


def gradients(value: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a sum in which each position has a weight of its own, such as a trainer may give."""
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * weights).sum(), of)


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_equals_autograd(rows: int, made: Any) -> None:
    """Values and gradients of head and hidden states, for tiles of so many rows."""
    head, hidden, labels = made
    found = token_logprobs(head, hidden, labels, rows)
    whole = torch.log_softmax(head(hidden), dim=-1)
    expected = whole.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    ours, theirs = (gradients(value, hidden, *head.parameters()) for value in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_no_label_at_all(made: Any) -> None:
    """Zeros, and a gradient of zeros: another worker's micro-batch may have labels."""
    head, hidden, labels = made
    found = token_logprobs(head, hidden, torch.full_like(labels, -100), 4)
    assert not found.any()
    found.sum().backward()
    assert not hidden.grad.any() and not head.weight.grad.any()


def test_a_second_backward_pass_is_an_error_and_no_wrong_gradient(made: Any) -> None:
    """The first one has overwritten what was kept."""
    head, hidden, labels = made
    total = token_logprobs(head, hidden, labels, 1000).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
