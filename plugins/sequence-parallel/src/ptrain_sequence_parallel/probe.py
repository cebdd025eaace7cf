"""Whether a model makes of a sequence in parts what it makes of the whole: asked of the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ptrain import ModelError
from ptrain_sequence_parallel.shards import cut

if TYPE_CHECKING:
    from ptrain import Run
    from ptrain_sequence_parallel.groups import Group

LENGTHS = (5, 8)
"""Of the documents of the row on which it is tried."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far both may be apart, as a share of the largest number."""


@torch.no_grad()
def check_parts(run: Run, engine: Any, group: Group) -> None:
    """Raise ModelError where a layer mixes positions elsewhere than in its attention, so that it needs all of them.

    Every worker takes part. The model is switched to evaluation for a moment: dropout would differ.
    """
    whole = _batch(run)
    own = cut(whole, group, 0)
    engine.train(False)
    try:
        expected = engine(lambda: run.call("forward", model=run.model, batch=whole))
        found = engine(lambda: run.call("forward", model=run.model, batch=own))
    finally:
        engine.train(True)
    begin = group.rank * found.shape[1]
    there = expected[:, begin : begin + found.shape[1]]  # the last part may be padding alone
    difference = (found[:, : there.shape[1]] - there).float().abs().amax().item() if there.numel() else 0.0
    worst = torch.tensor([difference, there.float().abs().amax().item() if there.numel() else 0.0], device=run.device)
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    difference, largest = worst.tolist()
    if not difference <= TOLERANCE.get(run.model.dtype, 0.05) * largest:
        error = ModelError(
            f"{type(run.model).__name__} makes something else of a sequence in {group.size} parts than of the whole: "
            f"hidden states differ by {difference:.2g}",
            fix="train it without `sequence-parallel`, or with `size: 1`",
        )
        if run.model.dtype == torch.float32 or not _routes(run):
            raise error
        run.warn(f"{error} (rounding may have sent tokens to other experts, which would be no fault)")


def _routes(run: Run) -> bool:
    """Whether a model sends tokens to experts, so that rounding makes a great difference now and then."""
    return bool(getattr(run.model.config.get_text_config(), "num_experts_per_tok", None))


def _batch(run: Run) -> dict[str, Any]:
    """One row of documents, on the device."""
    from ptrain.data.collate import collate
    from ptrain.stages import to_device

    ids = (7 * torch.arange(sum(LENGTHS)) + 1) % run.model.config.get_text_config().vocab_size
    row = {"input_ids": ids.numpy(), "labels": ids.numpy(), "document_lengths": list(LENGTHS)}
    return to_device(collate([row], pad_id=0), run.device)
