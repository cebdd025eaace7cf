"""What is checked before training: that the rows hold something to learn, and that the model is large enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


NEEDED = {
    "infonce": "a positive",
    "cosent": "scores",
    "margin_mse": "a positive and another document, both with scores",
    "kl": "two documents with scores",
}
"""What a row has from which a loss learns."""


def check_rows(dataset: Dataset, loss: str, count: Callable[[Sequence[int], Sequence[float]], int]) -> None:
    """Raise DataError where the loss has nothing to learn from any of the training rows.

    Args:
        count: how much it learns from a row, by the relations and scores of its documents.
    """
    table: Any
    for table in dataset.select_columns(["relations", "scores"]).with_format("arrow").iter(batch_size=1000):
        columns = (table[name].to_pylist() for name in ("relations", "scores"))
        if any(count(relations, scores) for relations, scores in zip(*columns, strict=True)):
            return
    raise DataError(
        f"there is nothing for `loss: {loss}` to learn from: no training row has {NEEDED.get(loss, 'what it needs')}",
        fix="for pairs of sentences with a score, set `loss: cosent`" if loss == "infonce" else None,
    )
