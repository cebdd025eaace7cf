"""The losses of pairs against their formulas, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptrain_dpo.losses import Pairs, ipo, sigmoid

logprob = st.floats(-50, 0)


def pairs(*values: float) -> Pairs:
    return Pairs(*(torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values))


@given(values=st.tuples(logprob, logprob, logprob, logprob), beta=st.floats(0.01, 1), smoothing=st.floats(0, 0.49))
def test_sigmoid(values: tuple[float, float, float, float], beta: float, smoothing: float) -> None:
    """Loss and gradient of the closed form; its gradient vanishes where the preference is as sure as the labels."""
    one = pairs(*values)
    loss = sigmoid(one, beta, smoothing)
    (gradient,) = torch.autograd.grad(loss, one.chosen)
    margin = (values[0] - values[2]) - (values[1] - values[3])
    right, wrong = (math.log1p(math.exp(-abs(x))) + max(-x, 0) for x in (beta * margin, -beta * margin))
    assert loss.item() == pytest.approx((1 - smoothing) * right + smoothing * wrong, abs=1e-9)
    sure = 1 / (1 + math.exp(-beta * margin)) if beta * margin > -700 else 0.0
    assert gradient.item() == pytest.approx(beta * (sure - (1 - smoothing)), abs=1e-9)


@given(values=st.tuples(logprob, logprob, logprob, logprob), beta=st.floats(0.01, 1))
def test_ipo(values: tuple[float, float, float, float], beta: float) -> None:
    one = pairs(*values)
    loss = ipo(one, beta, 0.0)
    (gradient,) = torch.autograd.grad(loss, one.rejected)
    margin = (values[0] - values[2]) - (values[1] - values[3])
    assert loss.item() == pytest.approx((margin - 1 / (2 * beta)) ** 2, rel=1e-9, abs=1e-9)
    assert gradient.item() == pytest.approx(-2 * (margin - 1 / (2 * beta)), rel=1e-9, abs=1e-9)


def test_without_a_margin_dpo_is_ln_2() -> None:
    assert sigmoid(pairs(-3, -4, -3, -4), 0.1, 0.0).item() == pytest.approx(math.log(2), abs=1e-12)
