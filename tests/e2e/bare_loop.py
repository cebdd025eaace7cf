"""The oracle: training as a bare PyTorch loop, with nothing of ptrain in it.

Rows are given as token ids and labels; the order is numpy's permutation of (seed, epoch). Every document is
computed on its own, so that there is no padding, no packing and no mask to get wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import PreTrainedModel, get_scheduler

Document = tuple[list[int], list[int]]
Rows = list[list[Document]]
NO_DECAY = ("bias", "norm.weight", "norm_swiftkv.weight")


def permutation(rows: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(rows).tolist()


def loss_sum(model: PreTrainedModel, document: Document) -> torch.Tensor:
    """The summed cross-entropy of one document's labels."""
    ids, labels = (torch.tensor([part]) for part in document)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def supervised(model: PreTrainedModel, rows: Rows) -> Iterator[torch.Tensor]:
    """The mean cross-entropy of all labels of a step, a part for each document."""
    documents = [document for row in rows for document in row]
    count = sum(label != -100 for _, labels in documents for label in labels[1:])
    return (loss_sum(model, document) / count for document in documents)


def train(
    model: PreTrainedModel,
    rows: Rows,
    *,
    batch: int,
    steps: int,
    lr: float,
    seed: int,
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    parts: Callable[[PreTrainedModel, Rows], Iterator[torch.Tensor]] = supervised,
) -> list[float]:
    """Train `model` in place on `rows` (each a list of documents) and return the loss of each step: the sum of `parts`."""
    decay = [p for n, p in model.named_parameters() if not n.endswith(NO_DECAY)]
    rest = [p for n, p in model.named_parameters() if n.endswith(NO_DECAY)]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999))
    warmup = math.ceil(warmup_ratio * steps)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    per_epoch, losses = math.ceil(len(rows) / batch), []
    model.train()
    for step in range(steps):
        epoch, at = divmod(step, per_epoch)
        chosen = permutation(len(rows), seed, epoch)[at * batch : (at + 1) * batch]
        total = 0.0
        for loss in parts(model, [rows[index] for index in chosen]):
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return losses
