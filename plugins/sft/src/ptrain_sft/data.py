"""The `data` sections of `sft` and `causal`, and how their rows become token rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field, model_validator

import ptrain

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

    @model_validator(mode="after")
    def _one_policy(self) -> Any:
        if self.filter_samples and self.overlength not in (None, "drop"):
            raise ValueError(f"`filter_samples: true` means `overlength: drop`, but `overlength` is {self.overlength}")
        return self


class CausalData(ptrain.DataConfig):
    """The `data` section of `causal`."""


def process_sft(run: Run, split: str, dataset: Dataset) -> Dataset:
    """Token rows of conversations: one a row, or packed (training rows alone)."""
    from ptrain.data.pack import best_fit
    from ptrain.data.process import counted, encode_conversations
    from ptrain.data.workspace import workspace

    data, report = cast(SFTData, run.recipe.data), workspace().report(split)
    documents = encode_conversations(
        dataset,
        run.tokenizer,
        report,
        max_length=data.max_length,
        overlength=data.overlength or ("drop" if data.filter_samples else "error"),
        mask_inputs=data.mask_inputs,
        ignore_empty_think=data.ignore_empty_think,
        max_unsupervised=data.max_unsupervised,
    )
    packed = data.pack_samples and split == "train"
    rows = documents.bins(best_fit(documents.lengths, data.max_length)) if packed else documents.whole()
    return counted(documents.rows(rows, split), report, data.max_length if packed else None)


def process_causal(run: Run, split: str, dataset: Dataset) -> Dataset:
    """Token rows of exactly `max_length` tokens, from shuffled documents; the last partial one is left out."""
    import numpy as np

    from ptrain.data.pack import slice_and_pack
    from ptrain.data.process import counted, encode_texts
    from ptrain.data.workspace import workspace

    data, report = run.recipe.data, workspace().report(split)
    documents = encode_texts(dataset, run.tokenizer, report)
    order = np.random.default_rng(data.seed).permutation(len(documents))
    report.lost_tokens += int(documents.lengths.sum()) % data.max_length
    rows = slice_and_pack(documents.lengths, data.max_length, order)
    return counted(documents.rows(rows, split), report, data.max_length)
