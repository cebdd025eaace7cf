"""The model part `embed`: the body of a model of transformers, and how its hidden states become one vector a text."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

import ptrain
from ptrain import ModelError
from ptrain_embed.modules import Modules, load_projection, read
from ptrain_embed.pooling import Pooling, pool, pool_parts

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from ptrain import Batch, Run

OTHER_NAMES = {"first_token": "cls", "last_token": "last", "lasttoken": "last"}
"""What else `pooling` is called."""
KEPT = ("pooling", "normalize", "query_prompt", "document_prompt")
"""Keys that say something else than the model itself does, where they are given."""


class EmbedModel(ptrain.HuggingFaceModel):
    """`embed`: an encoder or a decoder of transformers that gives one vector a text.

    A model of sentence-transformers begins with its own pooling, projection, normalisation and prompts.
    """

    class Config(ptrain.HuggingFaceModel.Config):
        """Keys of `embed`."""

        pooling: Pooling | None = None
        """What a text's vector is made of: its first token (`cls`; also written `first_token`), its last one (`last`,
        `last_token`) or the `mean` of all; by default what the model was made with, otherwise `mean`."""
        normalize: bool | None = None
        """Give every vector the length 1; by default as the model was made, otherwise true."""
        projection: Annotated[int, Field(ge=1)] | None = None
        """A linear layer to vectors of so many numbers; by default the model's own, or none."""
        query_prompt: str | None = None
        """Text before every query, such as `query: `; by default the model's own, or none."""
        document_prompt: str | None = None
        """Text before every document; by default the model's own, or none."""

        @field_validator("pooling", mode="before")
        @classmethod
        def _other_names(cls, value: Any) -> Any:
            return OTHER_NAMES.get(value, value) if isinstance(value, str) else value

    config: Config
    exported_as = "sentence-transformers"
    may_lack = r"(^|\.)pooler\."  # which nothing here asks

    @functools.cached_property
    def modules(self) -> Modules:
        """What follows the body: as the model was made, changed as the recipe says.

        Raises:
            ModelError: the model does something that can't be trained here.
        """
        name = self.config.name_or_path
        own = (read(name, self.config.revision) if name else None) or Modules()
        given = {key: value for key in KEPT if (value := getattr(self.config, key)) is not None}
        if self.config.projection not in (None, own.dimension):
            given.update(projection=None, dimension=self.config.projection)
        return dataclasses.replace(own, **given)

    def auto(self, config: PretrainedConfig) -> str:
        """The body alone; of an encoder with a decoder, the encoder."""
        # The configuration of such an encoder, once it is saved, says so by its architecture alone.
        half = any(name.endswith("EncoderModel") for name in config.architectures or ())
        return "AutoModelForTextEncoding" if config.is_encoder_decoder or half else "AutoModel"

    def adapt(self, model: PreTrainedModel) -> None:
        """Put the projection beside the body, if there is one, and freeze what no vector depends on."""
        super().adapt(model)
        body: Any = model
        if getattr(body, "pooler", None) is not None:
            # Weight decay would change it without a gradient.
            body.pooler.requires_grad_(False)
        if self.modules.dimension is not None:
            body.projection = self._projection(model, self.modules.dimension)

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        """With the projection, which is trained beside the adapter."""
        super().restore(model, folder)
        saved = read(str(folder))
        if saved is not None and saved.projection is not None:
            projection: Any = model.projection
            load_projection(projection, saved.projection)

    def _projection(self, model: PreTrainedModel, dimension: int) -> torch.nn.Linear:
        """In the model's dtype; its numbers are written on the CPU, whatever ZeRO has made of the body."""
        import torch

        device = "meta" if model.device.type == "meta" else "cpu"
        layer = torch.nn.Linear(width(model), dimension, bias=False, dtype=model.dtype, device=device)
        if self.modules.projection is not None and device != "meta":
            load_projection(layer, self.modules.projection)
        return layer

    def fingerprint(self, run: Run) -> Any:
        """Of the body, and of what follows it."""
        return [super().fingerprint(run), {**dataclasses.asdict(self.modules), "projection": None}]


def width(model: PreTrainedModel) -> int:
    """How many numbers a hidden state has."""
    return model.config.get_text_config().hidden_size


def modules(run: Run) -> Modules:
    """What follows the body of the run's model.

    Raises:
        ModelError: it is of another kind, which gives no vectors.
    """
    part = run.parts.model
    if not isinstance(part, EmbedModel):
        raise ModelError(
            f"the model part `{run.recipe.model.type}` gives no vectors of texts", fix="write `type: embed` in `model`"
        )
    return part.modules


def prompts(run: Run) -> tuple[str, str]:
    """What comes before a query, and before a document."""
    return modules(run).query_prompt, modules(run).document_prompt


def embed_batch(run: Run, batch: Batch) -> torch.Tensor:
    """The vectors of a batch's documents, row by row, fp32 [n, d]; within the engine's forward pass."""
    hidden = run.call("forward", model=run.model, batch=batch)
    made = modules(run)
    if run.stack.changes("sequence_sum"):
        return finished(run.model, pool_parts(run, hidden, batch, made.pooling), made)
    return vectors(run.model, hidden, batch, made)


def vectors(model: PreTrainedModel, hidden: torch.Tensor, batch: Batch, made: Modules) -> torch.Tensor:
    """From hidden states [b, s, h] to vectors, fp32 [n, d]: pooled, projected and normalised."""
    return finished(model, pool(hidden, batch, made.pooling), made)


def finished(model: PreTrainedModel, found: torch.Tensor, made: Modules) -> torch.Tensor:
    """From pooled hidden states [n, h] to vectors, fp32 [n, d]: projected and normalised."""
    from torch.nn.functional import normalize

    projection: Any = getattr(model, "projection", None)
    found = (found if projection is None else projection(found)).float()
    return normalize(found, dim=-1) if made.normalize else found
