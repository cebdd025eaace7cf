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


def task_of(name: str, split: str) -> Any:
    """The task of mteb of this name, for one of its splits; its data is not loaded yet.

    Raises:
        DataError: mteb is not installed, it has no such task, or the task has no such split or is not about texts.
    """
    if importlib.util.find_spec("mteb") is None:
        raise DataError("tasks of MTEB need the package mteb, which is not installed", fix="pip install mteb")
    import mteb

    try:
        about = mteb.get_task(name).metadata
    except KeyError as error:
        said = str(error.args[0]).removeprefix("KeyError: ")
        raise DataError(f"mteb has no task `{name}`: {said}", expected="a name of `mteb.get_tasks()`") from error
    if split not in about.eval_splits:
        raise DataError(f"the task `{name}` has no split `{split}`", expected=" or ".join(about.eval_splits))
    if about.modalities != ["text"]:
        raise DataError(f"the task `{name}` has {' and '.join(about.modalities)}", expected="a task of texts alone")
    return mteb.get_task(name, eval_splits=[split])


def measure_task(encoder: Encoder, name: str, split: str) -> dict[str, float]:
    """The main score of a task on a split, by subset.

    Raises:
        DataError: as `task_of` says, or its data can't be loaded.
    """
    import mteb

    task = task_of(name, split)
    try:
        task.load_data()
    except (OSError, ValueError) as error:
        raise DataError(f"the data of the task `{name}` can't be loaded: {error}") from error
    return scores(mteb.evaluate(model_of(encoder), task, cache=None), split)


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
        """Cosines of all pairs; inner products where the model does not normalise, as what is saved says."""
        return self._scaled(embeddings1) @ self._scaled(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """The same of corresponding pairs."""
        return (self._scaled(embeddings1) * self._scaled(embeddings2)).sum(dim=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb notes of the model beside its results."""
        from mteb.models import ModelMeta

        return ModelMeta.create_empty({"name": self._name, "embed_dim": self.encoder.dimension})

    def _scaled(self, vectors: Any) -> torch.Tensor:
        import torch

        found = torch.as_tensor(vectors, dtype=torch.float32)
        return torch.nn.functional.normalize(found, dim=-1) if self.encoder.normalised else found
