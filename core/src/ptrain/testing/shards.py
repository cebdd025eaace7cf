"""User code that cuts every sequence in two, one half for each of two workers, as a plugin for long sequences would.

It answers and wraps the same stages as such a plugin, but has each worker compute the whole body of the model: it is to
find trainers that do not go through `forward`, `token_logprobs` and `sequence_sum`, not to save memory. A loss that is
computed from one half alone is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ptrain import callback, hookimpl

if TYPE_CHECKING:
    import torch

    from ptrain import Batch, Run

UNCUT = "uncut"
"""The key of a batch under which it is whole."""
WIDENED = "widened"
"""The key of a batch that was cut, and is whole again for the body of the model."""


@hookimpl
def configure(run: Run) -> None:
    """Both workers read the same rows."""
    run.data_rank, run.data_world = 0, 1


@hookimpl(wrapper=True)
def create_dataloader(run: Run) -> Any:
    """Batches of which each worker has its half of the positions."""
    from ptrain.data.attached import Attached

    return Attached((yield), lambda batch: halved(run, batch))


@callback("pre-forward")
def widen(batch: Batch) -> Mapping[str, Any] | None:
    """The body of the model is to see all positions."""
    return {"batch": {**batch[UNCUT], WIDENED: True}} if UNCUT in batch else None


@hookimpl(wrapper=True)
def forward(run: Run, batch: Batch) -> Any:
    """The hidden states of this worker's half, of a batch that was cut."""
    hidden = yield
    return half(run, hidden) if WIDENED in batch else hidden


@hookimpl(wrapper=True)
def sequence_sum(run: Run) -> Any:
    """The sums over both halves."""
    import torch

    own = yield
    size = torch.tensor(len(own))
    torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)
    return _added(torch.cat([own, own.new_zeros(int(size) - len(own), *own.shape[1:])]))


def half(run: Run, values: torch.Tensor) -> torch.Tensor:
    """What of `values` [b, s, ...] belongs to this worker."""
    return values.chunk(run.world, dim=1)[run.rank]


def by_position(batch: Batch, value: Any) -> bool:
    """Whether `value` is a tensor with a place for each position, [b, s, ...]: a trainer's own as well as core's."""
    return getattr(value, "shape", ())[:2] == batch["input_ids"].shape


def halved(run: Run, batch: Batch) -> Batch:
    """This worker's half of `batch`, with the whole of it under `UNCUT`."""
    cut = {name: half(run, value) for name, value in batch.items() if by_position(batch, value)}
    return {**batch, **cut, UNCUT: batch}


def _added(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over the workers; so is its gradient, as each of them goes on from it."""
    import torch

    class Added(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            total = values.clone()
            torch.distributed.all_reduce(total)
            return total

        @staticmethod
        def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares any number of gradients
            ctx: Any, grad: torch.Tensor
        ) -> torch.Tensor:
            total = grad.contiguous().clone()
            torch.distributed.all_reduce(total)
            return total

    return Added.apply(values)
