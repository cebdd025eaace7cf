"""The trainer `embed`: embedding models for retrieval, from pairs, hard negatives or a teacher's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

import ptrain
from ptrain_embed.data import EmbedData
from ptrain_embed.negatives import Mining

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from ptrain import Batch, Loss, Run, Source, StepResult
    from ptrain_embed.contrast import Contrast, Measure
    from ptrain_embed.losses import Objective

Size = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
SIZES = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 1}},
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number", "minimum": 0},
        },
        {"type": "null"},
    ]
}
"""Every form in which sizes are given."""
TAUGHT = ("margin_mse", "kl")


class Embed(ptrain.Trainer):
    """`embed`: queries are to be nearer to their positives than to other documents.

    All rows of an optimizer step, on all workers, are one contrastive batch, however it is cut into micro-batches.
    Another loss is a subclass with its own `objective`.
    """

    class Config(ptrain.Config):
        """Keys of `embed`."""

        aliases: ClassVar[Mapping[str, str]] = {
            "loss_temperature": "temperature",
            "use_in_batch_negatives": "in_batch_negatives",
            "mrl_dim": "matryoshka",
        }
        not_prepared: ClassVar[frozenset[str]] = frozenset(
            {"loss", "temperature", "in_batch_negatives", "symmetric", "matryoshka", "teacher_temperature", "mine"}
        )

        loss: Literal["infonce", "cosent", "margin_mse", "kl"] = "infonce"
        """What is learnt: to tell positives from negatives (`infonce`), the order of graded pairs (`cosent`), or a
        teacher's scores of a query's documents, as margins (`margin_mse`) or as a distribution (`kl`)."""
        temperature: Annotated[float, Field(gt=0)] = 0.02
        """Similarities are divided by it (all losses but `margin_mse`); `loss_temperature` is the same key."""
        in_batch_negatives: bool = True
        """With `infonce`: the documents of all other queries of the step are negatives, and those of the query's own
        that have no label; false: only documents that are labelled negatives of it. `use_in_batch_negatives` is the
        same key."""
        symmetric: bool = False
        """With `infonce`: the mean of telling documents for a query and telling queries for a document."""
        matryoshka: Annotated[dict[Size, Weight] | None, WithJsonSchema(SIZES)] = None
        """Sizes to which embeddings can be cut afterwards: a size, a list of them, or weights by size. The loss is the
        weighted mean over these sizes and the whole; what is not given a weight has 1. `mrl_dim` is the same key."""
        teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
        """A teacher's scores are divided by it (`margin_mse` and `kl`)."""
        mine: Mining | None = None
        """How `ptrain embed mine` finds hard negatives for the rows of `data.sources`. Training itself does not read
        it."""

        @field_validator("matryoshka", mode="before")
        @classmethod
        def _sizes(cls, value: Any) -> Any:
            if isinstance(value, int) and not isinstance(value, bool):
                value = [value]
            return dict.fromkeys(value, 1.0) if isinstance(value, Sequence) and not isinstance(value, str) else value

        @model_validator(mode="after")
        def _of_this_loss(self) -> Any:
            contrastive = self.loss == "infonce"
            if not contrastive and (self.symmetric or not self.in_batch_negatives):
                key = "symmetric" if self.symmetric else "in_batch_negatives"
                raise ValueError(f"`{key}` belongs to `loss: infonce`, not to `{self.loss}`")
            if self.symmetric and not self.in_batch_negatives:
                raise ValueError(
                    "`symmetric` tells queries of a batch apart, which `in_batch_negatives: false` rules out"
                )
            if self.teacher_temperature != 1 and self.loss not in TAUGHT:
                raise ValueError(f"`teacher_temperature` belongs to `loss: margin_mse` and `kl`, not to `{self.loss}`")
            return self

    Data = EmbedData
    parts = {
        "model": "embed",
        "tokenizer": "huggingface",
        "optimizer": "adamw",
        "scheduler": "huggingface",
        "source": "huggingface",
        "evaluator": "loss",
    }

    def fingerprint(self, run: Run) -> Any:
        """The prompts, which are the model's."""
        from ptrain_embed.model import prompts

        return list(prompts(run))

    @ptrain.hookimpl(wrapper=True)
    def load(self, run: Run, source: Source) -> Any:
        """The rows of a source in one shape."""
        from ptrain_embed.rows import canonical_rows

        return canonical_rows(run, source, (yield))

    @ptrain.hookimpl
    def process(self, run: Run, split: str, dataset: Dataset) -> Dataset:
        """Each query and its documents as one row."""
        from ptrain_embed.data import process_rows

        return process_rows(run, split, dataset)

    @ptrain.hookimpl(wrapper=True)
    def create_config(self, run: Run) -> Any:
        """The model's configuration, whose vectors are long enough for every size that they are to be cut to."""
        from ptrain_embed.fits import check_sizes

        config = yield
        check_sizes(run, config, self.config.matryoshka or {})
        return config

    @ptrain.hookimpl
    def on_start(self, run: Run) -> None:
        """Say where what is saved is not the whole model."""
        if any(one.type == "huggingface" and one.enabled for one in run.recipe.checkpoint):
            run.warn(
                "the checkpoint `huggingface` saves the body of an embedding model alone, without its pooling, its "
                "projection and its prompts; write `type: sentence-transformers`"
            )

    @ptrain.hookimpl
    def create_dataloader(self, run: Run, split: str, dataset: Dataset) -> Any:
        """Batches made for contrast, of rows from which the loss can learn something."""
        from ptrain_embed.fits import check_rows
        from ptrain_embed.loaders import create_loader

        if split == "train":
            check_rows(dataset, self.config.loss, self.objective.count)
        return create_loader(run, split, dataset)

    @ptrain.hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Any:
        """What is below, where batches know what the loss of as many rows as a step has says of each."""
        from ptrain_embed.step import Windows

        loader = run.eval_loader
        rows = run.recipe.micro_batch_size * run.accumulation
        size = -(-rows // (run.recipe.eval_micro_batch_size or run.recipe.micro_batch_size))
        run.eval_loader = Windows(loader, size, lambda batches: self._cached(run, batches))
        try:
            return (yield)
        finally:
            run.eval_loader = loader

    @ptrain.hookimpl
    def step(self, run: Run, batches: list[Batch]) -> StepResult:
        """Core's step, of micro-batches that know what the loss of all of them says of each."""
        return ptrain.stages.step(run, self._cached(run, batches) if len(batches) > 1 else batches)

    @ptrain.hookimpl
    def count(self, run: Run, batch: Batch) -> Mapping[str, float]:
        """What the loss is a mean over: positive pairs, or what `loss` counts instead."""
        rows = zip(batch["relations"], batch["scores"], strict=True)
        return {"loss": sum(self.objective.count(relations, scores) for relations, scores in rows)}

    @ptrain.hookimpl
    def loss(self, run: Run, batch: Batch) -> Loss:
        """The summed loss of the queries of a micro-batch among all that it is contrasted with."""
        from ptrain_embed.step import passed_on

        loss, found = passed_on(run, batch, self.embed, self._compare)
        number = self.count(run, batch)["loss"]
        return ptrain.Loss({"loss": loss}, metrics={name: (value, number) for name, value in found.metrics.items()})

    def embed(self, run: Run, batch: Batch) -> torch.Tensor:
        """Embeddings of the queries and documents of a micro-batch, each query followed by its documents, [n, d]."""
        from ptrain_embed.model import embed_batch

        return embed_batch(run, batch)

    def _cached(self, run: Run, batches: Sequence[Batch]) -> list[Batch]:
        from ptrain_embed.step import cached

        return cached(run, batches, self.embed, self._compare)

    def _compare(self, run: Run, batches: Sequence[Batch], embeddings: Sequence[torch.Tensor]) -> list[Contrast]:
        from ptrain_embed.contrast import contrast
        from ptrain_embed.model import modules

        measure = self.measure(embeddings[0].shape[1], normalise=modules(run).normalize)
        return contrast(run, measure, batches, embeddings)

    @cached_property
    def objective(self) -> Objective:
        """The loss; a subclass gives another one here."""
        from ptrain_embed.losses import KL, CoSENT, InfoNCE, MarginMSE

        keys = self.config
        made = {
            "infonce": partial(InfoNCE, keys.temperature, keys.symmetric),
            "cosent": partial(CoSENT, keys.temperature),
            "margin_mse": partial(MarginMSE, keys.teacher_temperature),
            "kl": partial(KL, keys.temperature, keys.teacher_temperature),
        }
        return made[keys.loss]()

    def measure(self, size: int, *, normalise: bool) -> Measure:
        """How embeddings of `size` dimensions are compared; what they are cut to gets length 1 with `normalise`."""
        from ptrain_embed.contrast import Measure

        weights = {size: 1.0, **(self.config.matryoshka or {})}
        total = sum(weights.values())
        dimensions = {dimension: weight / total for dimension, weight in weights.items() if weight}
        return Measure(self.objective, self.config.in_batch_negatives, dimensions, normalise)
