"""What is checked before training: that the rows hold something to learn, and that the model is large enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ptrain import DataError, RecipeError

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain import Run

SIZES = ("matryoshka", "mrl_dim")
"""The spellings of the key."""


def check_sizes(run: Run, config: Any, sizes: Mapping[int, float]) -> None:
    """Raise RecipeError where embeddings are to be cut to more dimensions than they have."""
    from ptrain_embed.model import modules

    whole = modules(run).dimension or config.get_text_config().hidden_size
    wrong = sorted(size for size in sizes if size > whole)
    if wrong:
        raise RecipeError(
            f"`matryoshka` has the size {wrong[-1]}, and embeddings of this model have {whole} dimensions",
            where=next(filter(None, (run.loaded.positions.get((key,)) for key in SIZES)), None),
            expected=f"sizes up to {whole}",
        )
    if not any({whole: 1.0, **sizes}.values()):
        raise RecipeError(
            "`matryoshka` gives every size the weight 0",
            where=run.loaded.positions.get(("matryoshka",)),
            expected="a weight above 0 for one of them",
        )


def check_rows(dataset: Dataset, loss: str) -> None:
    """Raise DataError where no training row has what the loss learns."""
    if loss == "infonce":
        if not _any(dataset, "relations", lambda relation: relation == 1):
            raise DataError(
                "no row of the training data has a positive, which `loss: infonce` learns",
                fix="for pairs of sentences with a score, set `loss: cosent`",
            )
    elif not _any(dataset, "scores", lambda score: score == score):
        raise DataError(
            f"no row of the training data has scores, which `loss: {loss}` learns",
            expected="a column `score` or `scores` with a number for each document",
        )


def _any(dataset: Dataset, column: str, wanted: Any) -> bool:
    """Whether some value of a column of lists is wanted."""
    import numpy as np

    table: Any
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for chunk in table[column].chunks:
            if np.any(wanted(chunk.flatten().to_numpy(zero_copy_only=False))):
                return True
    return False
