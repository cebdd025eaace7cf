"""Divergences from a teacher against autograd's own, whole and in tiles, with a frozen head and a trained one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptrain.model import divergence
from ptrain.model.divergence import token_argmax, token_kl
from ptrain.model.head import OutputHead

VOCABULARY = 23


def made(seed: int = 0, trained: bool = False) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head, hidden states of student and teacher [3, 7, 5], and labels, some of which are none."""
    drawn = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(5, VOCABULARY, dtype=torch.float64).requires_grad_(trained)
    hidden = torch.randn(3, 7, 5, generator=drawn, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 7, 5, generator=drawn, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (3, 7), generator=drawn)
    labels[0, :3] = labels[2] = -100
    return layer, hidden, teacher, labels


def naive(head: Any, hidden: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, t: float) -> torch.Tensor:
    """All logits of both, and torch's own divergence."""
    logq, logp = (torch.log_softmax(head(x) / t, dim=-1) for x in (hidden, teacher))
    whole = torch.nn.functional.kl_div(logq, logp.detach(), reduction="none", log_target=True).sum(-1)
    return whole * (labels != -100)


def gradients(value: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a sum in which each position has a weight of its own, such as a trainer may give."""
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * weights).sum(), of)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_equals_autograd(trained: bool, rows: int, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, for tiles of so many rows, also of a head that scales and caps."""
    monkeypatch.setattr(divergence, "TILE_BYTES", 4 * VOCABULARY * rows)
    layer, hidden, teacher, labels = made(trained=trained)
    head = OutputHead(layer, 1.5, cap)
    found, expected = token_kl(head, hidden, teacher, labels, 2.0, VOCABULARY), naive(head, hidden, teacher, labels, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-6, rtol=0)
    of = (hidden, *(layer.parameters() if trained else ()))
    for one, other in zip(gradients(found, *of), gradients(expected, *of), strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=1e-6, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(token_kl(head, hidden, teacher, labels, 2.0, VOCABULARY), found.detach())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.3, 5), trained=st.booleans())
def test_a_student_that_is_the_teacher_is_0_away(seed: int, temperature: float, trained: bool) -> None:
    """Exactly, and so are the gradients (autograd's own, of a trained head, are rounded); any other is not."""
    head, hidden, teacher, labels = made(seed, trained)
    found = token_kl(head, hidden, hidden.detach().clone(), labels, temperature, VOCABULARY)
    found.sum().backward()
    assert not found.any()
    assert hidden.grad.abs().max() <= (1e-6 if trained else 0)
    other = token_kl(head, hidden, teacher, labels, temperature, VOCABULARY)
    assert (other[labels != -100] > 0).all() and not other[labels == -100].any()


@pytest.mark.parametrize("trained", [False, True])
def test_no_label_at_all(trained: bool) -> None:
    """Zeros, and a gradient of zeros: another worker's micro-batch may have labels."""
    head, hidden, teacher, labels = made(trained=trained)
    found = token_kl(head, hidden, teacher, torch.full_like(labels, -100), 1.0, VOCABULARY)
    assert not found.any()
    found.sum().backward()
    assert not hidden.grad.any()


def test_the_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all logits, where there is a label."""
    monkeypatch.setattr(divergence, "TILE_BYTES", 4 * VOCABULARY * 2)
    head, hidden, _, labels = made()
    found = token_argmax(head, hidden, labels, VOCABULARY)
    assert found.equal(head(hidden).argmax(-1).masked_fill(labels == -100, -100))
    assert token_argmax(head, hidden, torch.full_like(labels, -100), VOCABULARY).eq(-100).all()
