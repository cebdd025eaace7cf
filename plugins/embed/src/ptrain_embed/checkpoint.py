"""The checkpoint part `sentence-transformers`: a folder that sentence-transformers loads, with the same vectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import ptrain
from ptrain import CheckpointError, ModelError

if TYPE_CHECKING:
    import torch

    from ptrain import Run
    from ptrain_embed.modules import Modules

PROJECTION = "projection.weight"
"""The name of its weight in the model in training."""


class SentenceTransformers(ptrain.HuggingFaceCheckpoint):
    """`sentence-transformers`: the body as transformers saves it, and how its hidden states become vectors, with the
    prompts."""

    def write(self, run: Run, path: Path, weights: dict[str, torch.Tensor]) -> None:
        """The body, and beside it the modules that follow; on rank 0 alone.

        Raises:
            ModelError: the model gives no vectors.
        """
        from ptrain_embed.model import modules, width
        from ptrain_embed.modules import write

        made = dataclasses.replace(modules(run), max_length=longest(run))
        projection = weights.pop(PROJECTION, None)
        super().write(run, path, weights)
        write(path, made, width(run.model), projection)

    def verify(self, run: Run, path: Path) -> None:
        """Raise CheckpointError if the body does not load again as it is, or what follows it is read as another."""
        from ptrain_embed.model import modules
        from ptrain_embed.modules import read

        super().verify(run, path)
        try:
            found = read(str(path))
        except ModelError as error:
            raise CheckpointError(f"the export `{path}` does not load again: {error}") from error
        if found is None or _compared(found) != _compared(modules(run)):
            raise CheckpointError(f"the export `{path}` is read as {found}", expected=str(modules(run)))

    def advice(self, path: Path) -> str:
        """How to load it."""
        return f"load it with SentenceTransformer({str(path)!r})"


def _compared(made: Modules) -> Modules:
    """Without what says where it was read from, or how long texts may be."""
    return dataclasses.replace(made, projection=None, max_length=None)


def longest(run: Run) -> int:
    """The most tokens of a text in training, with special ones."""
    from ptrain_embed.encoder import limits

    return max(limits(run).values())
