"""The `data` sections of `sft` and `causal`, and how their rows become token rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import ptrain
from pydantic import Field

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain import Run


class SFTData(ptrain.DataConfig):
    """The `data` section of `sft`."""

    mask_inputs: bool = True
    """Learn the assistant's turns alone; false learns every token."""
    ignore_empty_think: bool = False
    """Do not learn a `<think></think>` without thoughts at the beginning of a turn."""
    overlength: Literal["error", "drop", "truncate_left", "truncate_right", "split"] | None = None
    """What becomes of rows longer than `max_length`; by default an error that counts them."""
    filter_samples: bool | None = None
    """True is the same as `overlength: drop`."""
    max_unsupervised: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of rows that may have no supervised token; they are left out. More is an error."""
    pack_samples: bool = False
    """Put several conversations in one row of at most `max_length` tokens; they do not see each other."""


class CausalData(ptrain.DataConfig):
    """The `data` section of `causal`."""


def process_sft(run: Run, split: str, dataset: Dataset) -> Dataset:
    """Token rows of conversations: one a row, or packed (training rows alone)."""
    from ptrain.data import process
    from ptrain.data.workspace import workspace

    data, report = run.recipe.data, workspace().report(split)
    documents = process.fit(
        process.encode_conversations(
            dataset,
            run.tokenizer,
            report,
            mask_inputs=data.mask_inputs,
            ignore_empty_think=data.ignore_empty_think,
        ),
        data.max_length,
        data.overlength or ("drop" if data.filter_samples else "error"),
        report,
        max_unsupervised=data.max_unsupervised,
    )
    if data.pack_samples and split == "train":
        rows = process.packed(documents, data.max_length, report)
    else:
        rows = ([document] for document in documents)
    return process.counted(process.write_tokens(rows, split), report)


def process_causal(run: Run, split: str, dataset: Dataset) -> Dataset:
    """Token rows of exactly `max_length` tokens, from shuffled documents."""
    import numpy as np
    from ptrain.data import process
    from ptrain.data.workspace import workspace

    data, report = run.recipe.data, workspace().report(split)
    order = np.random.default_rng(data.seed).permutation(len(dataset))
    documents = list(process.encode_texts(dataset.select(order), run.tokenizer))
    report.rows, report.documents = len(dataset), len(documents)
    rows = process.sliced(documents, data.max_length, report)
    return process.counted(process.write_tokens(rows, split), report)
