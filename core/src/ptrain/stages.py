"""Core's default for each stage: the bottom layer of every stack, as plain functions.

"super" is a plain call: a trainer whose `step` first generates calls `ptrain.stages.step` afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.errors import PluginError, TrainingError
from ptrain.hooks import hookimpl
from ptrain.results import Batch, Loss, StepResult

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ptrain.model.head import Head
    from ptrain.parts import Checkpoint, Source
    from ptrain.run import Run

IGNORED = -100


@hookimpl
def create_tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """What the tokenizer part makes."""
    return run.parts.tokenizer.create(run)


@hookimpl
def load(run: Run, source: Source) -> Dataset:
    """What the source part loads, or the part of it that `sample_ratio` or `sample_count` draws."""
    from ptrain.data.sources.base import sampled

    training = any(source is one for one in run.parts.sources)
    rows = source.load(run, source.config.split or ("train" if training else "eval"))
    return rows if source.samples else sampled(rows, source.config)


@hookimpl
def split(run: Run, dataset: Dataset) -> Mapping[str, Dataset]:
    """The rows divided by `data.train_eval_split`: which row lands where depends on `data.seed` alone.

    A row that a source repeats (`weight: 2`) lands on one side with all its copies.
    """
    import numpy as np

    from ptrain.data.load import same_rows

    train, evaluation = run.recipe.data.train_eval_split
    rows = same_rows(dataset) if train and evaluation else np.arange(len(dataset))
    count = int(rows.max(initial=-1)) + 1
    order = np.random.default_rng(run.recipe.data.seed).permutation(count)
    held_out = np.zeros(count, dtype=bool)
    held_out[order[: round(count * evaluation / (train + evaluation))]] = True
    chosen = held_out[rows]
    return {"train": dataset.select(np.flatnonzero(~chosen)), "eval": dataset.select(np.flatnonzero(chosen))}


@hookimpl
def process(run: Run, split: str, dataset: Dataset) -> Dataset | None:
    """The rows as they are, where they hold tokens already; otherwise the trainer's task."""
    return dataset if {"input_ids", "labels"} <= set(dataset.column_names) else None


@hookimpl
def create_dataloader(run: Run, split: str, dataset: Dataset) -> Iterable[Batch]:
    """A loader over the pure sampler; it starts at `run.progress.step`."""
    from ptrain.loaders import eval_loader, train_loader

    return train_loader(run, dataset) if split == "train" else eval_loader(run, dataset)


@hookimpl
def create_config(run: Run) -> PretrainedConfig:
    """What the model part makes."""
    return run.parts.model.create_config(run)


@hookimpl
def create_model(run: Run, config: PretrainedConfig) -> PreTrainedModel:
    """What the model part makes."""
    return run.parts.model.create_model(run, config)


@hookimpl
def create_optimizer(run: Run, model: PreTrainedModel) -> torch.optim.Optimizer:
    """What the optimizer part makes."""
    return run.parts.optimizer.create(run, model)


@hookimpl
def create_scheduler(
    run: Run, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """What the scheduler part makes."""
    return run.parts.scheduler.create(run, optimizer, total_steps)


@hookimpl
def create_engine(
    run: Run,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> Any:
    """DeepSpeed, with the recipe's block completed; layers are compiled where the recipe says so."""
    from ptrain.engine import Engine, Frozen, deepspeed_config
    from ptrain.recipe.env import value_of

    if run.recipe.model.compile:
        from ptrain.model.compiled import compile_layers

        count = compile_layers(model, run.device)
        run.say(f"{count} layers are compiled when they are first called, which takes its time")
    if optimizer is None:
        return Frozen(model, deepspeed_config(run.recipe, run.world), run.device)
    config = value_of(deepspeed_config(run.recipe, run.world), "deepspeed")
    return Engine(model, optimizer, config, run.recipe.gradient_clipping)


@hookimpl
def count(run: Run, batch: Batch) -> Mapping[str, float]:
    """The number of labels."""
    return {"loss": int((batch["shift_labels"] != IGNORED).sum())}


@hookimpl
def forward(run: Run, model: PreTrainedModel, batch: Batch, layers: Sequence[int] | None = None) -> torch.Tensor:
    """The hidden states of the model's body; documents of one row do not see each other."""
    from ptrain.model.attention import per_document
    from ptrain.model.between import Between
    from ptrain.model.rows import body_arguments, in_rows, one_a_row

    apart = one_a_row(model)
    with per_document(cut="attention_arguments" in batch), Between(model, layers or ()) as between:
        out = model.base_model(**body_arguments(model, batch, apart=apart)).last_hidden_state
    found = out if layers is None else between.stacked(out)
    return in_rows(found, batch) if apart else found


@hookimpl
def token_logprobs(run: Run, hidden: torch.Tensor, labels: torch.Tensor, head: Head | None = None) -> torch.Tensor:
    """Log-probabilities from logits at label positions alone, a tile at a time."""
    from ptrain.model.logprobs import token_logprobs as compute

    return compute(head or _own_head(run), hidden, labels, _tile_rows(run))


@hookimpl
def token_nll(run: Run, hidden: torch.Tensor, labels: torch.Tensor, head: Head | None = None) -> torch.Tensor:
    """The sum from logits at label positions alone, its gradient formed with it a tile at a time.

    Where a layer above core acts at `token_logprobs`, minus the sum of those.
    """
    from ptrain.model.nll import token_nll as compute

    if run.stack.changes("token_logprobs"):
        return -run.call("token_logprobs", hidden=hidden, labels=labels, head=head).sum()
    return compute(head or _own_head(run), hidden, labels, _tile_rows(run))


def _tile_rows(run: Run) -> int:
    """Positions whose logits are there at a time."""
    from ptrain.model.logprobs import tile_rows

    return tile_rows(run.hf_config.get_text_config().vocab_size, run.loss_tile)


@hookimpl
def token_argmax(run: Run, hidden: torch.Tensor, labels: torch.Tensor, head: Head | None = None) -> torch.Tensor:
    """The likeliest tokens from logits at label positions alone, a tile at a time."""
    from ptrain.model.divergence import token_argmax as compute

    return compute(head or _own_head(run), hidden, labels, run.hf_config.get_text_config().vocab_size)


@hookimpl
def token_kl(
    run: Run, hidden: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The divergence from logits at label positions alone, a tile at a time."""
    from ptrain.model.divergence import token_kl as compute

    size = run.hf_config.get_text_config().vocab_size
    return compute(_own_head(run), hidden, teacher, labels, temperature, size)


def _own_head(run: Run) -> Head:
    """The output layer of the run's model, which is checked when it is first needed."""
    from ptrain.model.head import check_head, output_head

    if run.head is None:
        head = output_head(run.model)
        check_head(run.model, head)
        run.head = head
    return run.head


@hookimpl
def sequence_sum(run: Run, values: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Sums by segment on this worker."""
    import torch

    inside = segment_ids >= 0
    size = int(segment_ids.max()) + 1 if segment_ids.numel() else 0
    sums = torch.zeros(max(size, 0), *values.shape[2:], dtype=torch.float32, device=values.device)
    return sums.index_add(0, segment_ids[inside], values[inside].float())


@hookimpl
def step(run: Run, batches: list[Batch]) -> StepResult:
    """One optimizer step: count the whole of it first, then divide each micro-batch's sums by that.

    Gradients therefore do not depend on how the batch is cut into micro-batches, accumulation and workers.

    Raises:
        TrainingError: the loss is not finite, or the gradient is not for the second time in a row; the weights are
            still those before the step.
    """
    counts = global_counts(run, batches)
    sums = Sums()
    for batch in batches:
        batch = to_device(batch, run.device)
        loss = forward_loss(run, batch)
        run.backward(loss, counts)
        sums.add(loss)
    metrics = sums.over_workers(run, counts)
    if not math.isfinite(metrics["loss"]):
        raise TrainingError(
            f"the loss of step {run.progress.step + 1} is {metrics['loss']}; the weights were not changed",
            fix="lower `optimizer.lr`, or look at the rows of this step; the last checkpoint is intact",
        )
    metrics["lr"] = float(run.scheduler.get_last_lr()[0])
    metrics["grad_norm"] = run.engine.update()
    if run.recipe.model.dtype != "fp16":  # which finds its loss scale by such steps
        _check_gradient(run, metrics["grad_norm"])
    run.scheduler.step()
    return StepResult(metrics["loss"], metrics)


def _check_gradient(run: Run, norm: float) -> None:
    """Warn of a gradient that is not finite, which the engine has left out; stop at the second in a row."""
    if math.isfinite(norm):
        return
    what = f"the gradient of step {run.progress.step + 1} is not finite"
    if not math.isfinite(run.trackers.last.get("grad_norm", 0.0)):
        raise TrainingError(
            f"{what}, nor was that of the step before; the weights were not changed by either",
            fix="look at what the loss computes (the root of 0 has no gradient, say), or at the rows of these steps",
        )
    run.warn(f"{what}, so the weights were not changed in it")


@hookimpl
def prepare_batch(run: Run, batch: Batch) -> Batch:
    """The batch as it is."""
    return batch


def forward_loss(run: Run, batch: Batch) -> Loss:
    """The loss of one micro-batch on the device, computed inside the engine's forward pass."""
    made: list[Loss] = []
    batch = run.call("prepare_batch", batch=batch)

    def work() -> dict[str, torch.Tensor]:
        made.append(as_loss(run.call("loss", batch=batch), batch))
        return made[0].sums

    sums = run.engine(work)
    return Loss(sums, made[0].weights, made[0].metrics)


def as_loss(value: Any, batch: Batch) -> Loss:
    """`value` as a `Loss`: a scalar, a mean over samples, becomes one term over samples.

    Raises:
        PluginError: it is neither.
    """
    if isinstance(value, Loss):
        return value
    if getattr(value, "ndim", None) == 0:
        rows = batch.get("rows", len(batch["input_ids"]))
        # A mean over nothing, which a micro-batch without rows gives, is no number.
        return Loss({"samples": value * rows if rows else 0 * value.nan_to_num(0.0, 0.0, 0.0)})
    raise PluginError(
        f"the stage `loss` returned {type(value).__name__}", expected="a `ptrain.Loss`, or a scalar tensor"
    )


def backward(run: Run, loss: Loss, counts: Mapping[str, float]) -> None:
    """Backpropagate weight x sum / global count, summed over the terms."""
    missing = set(loss.sums) - set(counts)
    if missing:
        raise PluginError(
            f"the loss has a term `{sorted(missing)[0]}` that the stage `count` does not count",
            expected=f"`count` to return each of {sorted(loss.sums)}",
        )
    parts = [loss.weights.get(term, 1.0) / counts[term] * value for term, value in loss.sums.items()]
    run.engine.backward(sum(parts[1:], start=parts[0]))


def global_counts(run: Run, batches: list[Batch]) -> dict[str, float]:
    """By term, the count over all `batches` of all workers, at least 1; `samples` and `tokens` too."""
    from ptrain.engine import sum_over_workers

    total: dict[str, float] = {"samples": 0.0, "tokens": 0.0}
    for batch in batches:
        lengths = batch["document_lengths"]
        rows = batch.get("rows", len(lengths))
        # Workers that share rows count the tokens of these together, so that a step has as many as it would have.
        own = {"samples": rows, "tokens": sum(map(sum, lengths)) / run.shards if rows else 0}
        for term, value in {**own, **run.call("count", batch=batch)}.items():
            total[term] = total.get(term, 0.0) + float(value)
    values = dict(zip(total, sum_over_workers(list(total.values()), run.device), strict=True))
    values["tokens"] = round(values["tokens"], 3)  # thirds
    return {term: max(value, 1.0) for term, value in values.items()}


class Sums:
    """Running sums of terms and metrics over micro-batches, kept on the device until the step is over."""

    def __init__(self) -> None:
        self.terms: dict[str, Any] = {}
        self.metrics: dict[str, list[Any]] = {}
        self.weights: Mapping[str, float] = {}

    def add(self, loss: Loss) -> None:
        """Add one micro-batch."""
        self.weights = loss.weights
        for term, value in loss.sums.items():
            self.terms[term] = self.terms.get(term, 0.0) + value.detach()
        for name, (value, number) in loss.metrics.items():
            held = self.metrics.setdefault(name, [0.0, 0.0])
            held[0], held[1] = held[0] + value, held[1] + number

    def over_workers(self, run: Run, counts: Mapping[str, float]) -> dict[str, float]:
        """The normalised loss, its terms where there are several, the metrics, and the tokens of the step."""
        from ptrain.engine import sum_over_workers

        flat = [*self.terms.values(), *(x for pair in self.metrics.values() for x in pair)]
        values = sum_over_workers([float(x) for x in flat], run.device)
        means = {term: value / counts[term] for term, value in zip(self.terms, values, strict=False)}
        pairs = values[len(means) :]
        found = {"loss": sum(self.weights.get(term, 1.0) * mean for term, mean in means.items())}
        if len(means) > 1:
            found.update({f"loss/{term}": mean for term, mean in means.items()})
        for at, name in enumerate(self.metrics):
            found[name] = pairs[2 * at] / pairs[2 * at + 1] if pairs[2 * at + 1] else math.nan
        return {**found, "tokens": counts["tokens"]}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    move = {name: value.to(device, non_blocking=True) for name, value in batch.items() if hasattr(value, "to")}
    return {**batch, **move}


@hookimpl
def evaluate(run: Run) -> Mapping[str, float]:
    """The metrics of every evaluator, each added over the workers and divided once."""
    from ptrain.evaluators import run_evaluators

    return run_evaluators(run)


@hookimpl
def checkpoint(run: Run, part: Checkpoint, path: Path) -> Path:
    """What the checkpoint part writes."""
    part.save(run, path)
    return path
