"""What stages return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


Batch = dict[str, Any]
"""One micro-batch: `input_ids`, `shift_labels`, `position_ids`, `document_ids` (int64 [b, s]),
`document_lengths` (a list of ints for each row), `rows` (how many are real), `split` ("train" or "eval"),
`row_numbers` (which rows of the split these are), and whatever a trainer adds. A worker that has no rows left gets a
micro-batch without any.

Where workers share rows, each with some of the positions, the tensors hold those of this worker, and everything else is
of the whole rows; the batch then has `row_length` too, the number of positions of a whole row with its padding, and
`attention_arguments`, a mapping of further keyword arguments that attention functions get."""


@dataclass
class Loss:
    """The loss of one micro-batch, as sums by term.

    Core backpropagates `weight x sum / global count` summed over the terms, where the count of a term is
    what stage `count` says, added over the whole optimizer step and all workers.

    Attributes:
        sums: by term, a scalar fp32 tensor with a gradient: the sum, not the mean.
        weights: by term, its factor; 1 where it is missing.
        metrics: by name, `(sum, count)`, for display alone; the same names for every micro-batch on every worker,
            also for one without rows.
    """

    sums: dict[str, torch.Tensor]
    weights: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, tuple[float | torch.Tensor, float]] = field(default_factory=dict)


@dataclass
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: the normalised loss over all workers and micro-batches.
        metrics: what is recorded: terms, `grad_norm`, `tokens`, `lr`, ...
    """

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Progress:
    """Where the run is.

    `step` counts optimizer steps done; `samples` those consumed in this epoch; `evaluated` is the step after
    which the run was last evaluated, -1 before that.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    tokens: int = 0
    evaluated: int = -1


class StopRequested(BaseException):
    """A signal or the kill switch asks the run to save and stop; like KeyboardInterrupt, it is no error."""
