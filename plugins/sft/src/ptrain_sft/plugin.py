"""The trainers `sft` (chat data, loss on the assistant's turns) and `causal` (plain text, loss on every token)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ptrain
from ptrain_sft.data import CausalData, SFTData

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain import Batch, Loss, Run

PARTS = {
    "model": "huggingface",
    "tokenizer": "huggingface",
    "optimizer": "adamw",
    "scheduler": "huggingface",
    "evaluator": "loss",
}


class SFT(ptrain.Trainer):
    """`sft`: supervised fine-tuning on conversations; cross-entropy on the assistant's turns."""

    Data = SFTData
    parts = {**PARTS, "source": "huggingface_instruct"}

    @ptrain.hookimpl
    def process(self, run: Run, split: str, dataset: Dataset) -> Dataset:
        """Render, mask, tokenise, and pack where the recipe says so."""
        from ptrain_sft.data import process_sft

        return process_sft(run, split, dataset)

    @ptrain.hookimpl
    def loss(self, run: Run, batch: Batch) -> Loss:
        """The sum of minus the log-probability of every label."""
        hidden = run.call("forward", model=run.model, batch=batch)
        return ptrain.Loss({"loss": run.call("token_nll", hidden=hidden, labels=batch["shift_labels"])})


class Causal(SFT):
    """`causal`: continued pre-training on text; every token is a label."""

    Data = CausalData
    parts = {**PARTS, "source": "huggingface_causal"}

    @ptrain.hookimpl
    def process(self, run: Run, split: str, dataset: Dataset) -> Dataset:
        """Tokenise and cut into samples of exactly `max_length` tokens."""
        from ptrain_sft.data import process_causal

        return process_causal(run, split, dataset)
