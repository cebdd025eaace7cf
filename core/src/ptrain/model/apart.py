"""Whether documents in one row of a batch see each other: asked of the model itself, before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ptrain.errors import ModelError
from ptrain.model.head import TOLERANCE

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain.run import Run

LENGTHS = (5, 4)
"""Of the two documents on which it is tried."""


def packed(dataset: Dataset) -> bool:
    """Whether a row holds several documents."""
    import pyarrow.compute as pc

    if "document_lengths" not in dataset.column_names:
        return False
    tables = dataset.select_columns(["document_lengths"]).with_format("arrow").iter(batch_size=10_000)
    return any((pc.max(pc.list_value_length(table["document_lengths"])).as_py() or 0) > 1 for table in tables)  # type: ignore[index]


@torch.no_grad()
def check_apart(run: Run) -> None:
    """Raise ModelError where what a model makes of a document depends on the one before it in the row.

    Every worker takes part. The model is switched to evaluation for a moment: dropout would differ.
    """
    from ptrain.data.collate import collate

    # Some implementations look at positions in batches of one row alone.
    rows = 2 if max(run.recipe.micro_batch_size, run.recipe.eval_micro_batch_size or 1) > 1 else 1
    size = run.model.config.get_text_config().vocab_size
    ids = (7 * torch.arange(sum(LENGTHS)) + 1) % size
    both = {"input_ids": ids.numpy(), "labels": ids.numpy(), "document_lengths": list(LENGTHS)}
    later = ids[LENGTHS[0] :].numpy()
    alone = {"input_ids": later, "labels": later, "document_lengths": [LENGTHS[1]]}
    mode = run.model.training
    run.model.eval()
    try:
        one, other = (_states(run, collate([row] * rows, pad_id=0)) for row in (both, alone))
    finally:
        run.model.train(mode)
    difference, largest = (one[LENGTHS[0] :] - other).abs().max(), other.abs().max()
    if not difference <= TOLERANCE.get(run.model.dtype, 0.05) * largest:
        raise ModelError(
            f"documents that are packed into one row see each other in {type(run.model).__name__}: what it makes of "
            f"the second differs by {difference.item():.2g} from what it makes of it alone",
            fix="set `data.pack_samples: false`, or another `model.attn_implementation`",
        )


def _states(run: Run, batch: dict[str, object]) -> torch.Tensor:
    """The hidden states of the last row, [s, h] in fp32."""
    there = {name: value.to(run.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return run.call("forward", model=run.model, batch=there)[-1].float()
