"""The trainer `embed`: embedding models for retrieval, from pairs, hard negatives or a teacher's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

import ptrain

if TYPE_CHECKING:
    from ptrain_embed.contrast import Measure
    from ptrain_embed.losses import Objective

Size = Annotated[int, Field(ge=1)]
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
            {"loss", "temperature", "in_batch_negatives", "symmetric", "matryoshka", "teacher_temperature"}
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
        matryoshka: dict[Size, Annotated[float, Field(ge=0)]] | None = None
        """Sizes to which embeddings can be cut afterwards: a size, a list of them, or weights by size. The loss is the
        weighted mean over these sizes and the whole; what is not given a weight has 1. `mrl_dim` is the same key."""
        teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
        """A teacher's scores are divided by it (`margin_mse` and `kl`)."""

        @field_validator("matryoshka", mode="before")
        @classmethod
        def _sizes(cls, value: Any) -> Any:
            if isinstance(value, int) and not isinstance(value, bool):
                value = [value]
            return dict.fromkeys(value, 1.0) if isinstance(value, Sequence) and not isinstance(value, str) else value

        @model_validator(mode="after")
        def _of_this_loss(self) -> Any:
            contrastive = self.loss == "infonce"
            if not contrastive and (self.symmetric or "in_batch_negatives" in self.model_fields_set):
                key = "symmetric" if self.symmetric else "in_batch_negatives"
                raise ValueError(f"`{key}` belongs to `loss: infonce`, not to `{self.loss}`")
            if self.symmetric and not self.in_batch_negatives:
                raise ValueError(
                    "`symmetric` tells queries of a batch apart, which `in_batch_negatives: false` rules out"
                )
            if "teacher_temperature" in self.model_fields_set and self.loss not in TAUGHT:
                raise ValueError(f"`teacher_temperature` belongs to `loss: margin_mse` and `kl`, not to `{self.loss}`")
            return self

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
