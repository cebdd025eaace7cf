"""Sums over the positions of sequences: of numbers, and of vectors."""

from __future__ import annotations

from typing import Any

import torch

from ptrain import stages

RUN: Any = None  # core's own sums ask nothing of it


def test_sums_by_segment() -> None:
    """In fp32, with a gradient; what is in no segment is left out, and a segment may have no position."""
    values = torch.arange(24, dtype=torch.bfloat16).view(2, 4, 3).requires_grad_()
    segments = torch.tensor([[0, 0, -1, 3], [3, 1, 1, -1]])
    found = stages.sequence_sum(RUN, values, segments)
    expected = torch.stack(
        [values[0, 0] + values[0, 1], values[1, 1] + values[1, 2], torch.zeros(3), values[0, 3] + values[1, 0]]
    ).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(stages.sequence_sum(RUN, values[..., 0], segments), expected[:, 0])
    found.sum().backward()
    assert values.grad is not None
    assert (values.grad[segments < 0] == 0).all()
    assert (values.grad[segments >= 0] == 1).all()
    assert len(stages.sequence_sum(RUN, values[:0], segments[:0])) == 0
