"""An encoder as mteb wants its models: `mteb.evaluate(model_of(encoder, "name"), tasks)`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ptrain import DataError

if TYPE_CHECKING:
    import torch

    from ptrain_embed.encoder import Encoder

NAME = "ptrain/model"


def check() -> None:
    """Raise DataError where mteb is not installed."""
    if importlib.util.find_spec("mteb") is None:
        raise DataError("tasks of MTEB need the package mteb, which is not installed", fix="pip install mteb")


def measure_task(encoder: Encoder, task: str, split: str) -> dict[str, float]:
    """The main score of a task on a split, by subset.

    Raises:
        DataError: there is no such task, or it does not have the split.
    """
    import mteb  # pyright: ignore[reportMissingImports]

    try:
        found = mteb.get_task(task)
    except (KeyError, ValueError) as error:
        raise DataError(f"mteb has no task `{task}`", expected="a name of `mteb.get_tasks()`") from error
    if split not in found.metadata.eval_splits:
        raise DataError(f"the task `{task}` has no split `{split}`", expected=" or ".join(found.metadata.eval_splits))
    chosen = mteb.get_task(task, eval_splits=[split])
    return scores(mteb.evaluate(model_of(encoder), chosen, cache=None), split)


def scores(result: Any, split: str) -> dict[str, float]:
    """The main score of each task and subset of what `mteb.evaluate` returned."""
    return {
        f"{task.task_name}/{one['hf_subset']}": float(one["main_score"])
        for task in result.task_results
        for one in task.scores[split]
    }


def model_of(encoder: Encoder, name: str = NAME) -> Any:
    """`encoder` as a model of mteb; texts that are neither queries nor documents get no prompt."""
    return MTEBModel(encoder, name)


class MTEBModel:
    """What mteb asks of an encoder."""

    def __init__(self, encoder: Encoder, name: str) -> None:
        self.encoder, self._name = encoder, name

    def encode(
        self, inputs: Any, *, prompt_type: Any = None, task_metadata: Any = None, **settings: Any
    ) -> torch.Tensor:
        """The embeddings [n, d] of the texts in batches of mteb."""
        kinds: Mapping[str, Literal["query", "document"]] = {"query": "query", "document": "document"}
        kind = None if prompt_type is None else kinds[str(getattr(prompt_type, "value", prompt_type))]
        return self.encoder.encode([text for batch in inputs for text in batch["text"]], kind)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of all pairs."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of corresponding pairs."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb notes of the model beside its results."""
        from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports]

        return ModelMeta.create_empty({"name": self._name, "embed_dim": self.encoder.dimension})


def _unit(vectors: Any) -> torch.Tensor:
    import torch

    return torch.nn.functional.normalize(torch.as_tensor(vectors, dtype=torch.float32), dim=-1)
