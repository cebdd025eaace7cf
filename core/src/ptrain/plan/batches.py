"""A micro-batch without values, as a worker would get it: what plugins make of batches is a part of the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptrain.errors import PtrainError

if TYPE_CHECKING:
    from ptrain.results import Batch
    from ptrain.run import Run


def blank_batch(run: Run, samples: int, length: int, unknown: list[str]) -> Batch:
    """The micro-batch on `meta` of `samples` rows of one document with `length` tokens, after the wrappers of the stage
    `create_dataloader`: the part of this worker, where sequences are cut.

    Args:
        unknown: gets a line where a wrapper needs values.
    """
    import torch

    ids = torch.zeros(samples, length, dtype=torch.int64, device="meta")
    batch: Batch = {
        "input_ids": ids, "shift_labels": ids, "position_ids": ids, "document_ids": ids,
        "document_lengths": [[length]] * samples, "rows": samples, "row_numbers": list(range(samples)),
        "split": "train",
    }  # fmt: skip
    try:
        loader = run.stack.wrapped("create_dataloader", [batch], run=run, split="train", dataset=None)
        batch = next(iter(loader))
    except Exception as error:  # whatever code of others raises where there are no values
        if isinstance(error, PtrainError) and error.__cause__ is None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        line = f"what plugins make of batches: {reason}"
        if line not in unknown:
            unknown.append(line)
    # With a mask, transformers does not look at positions, which have no values here.
    mask = torch.ones_like(batch["input_ids"])
    return {**batch, "attention_arguments": {**batch.get("attention_arguments", {}), "attention_mask": mask}}
