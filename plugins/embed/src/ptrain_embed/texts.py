"""Texts to tokens: with the special tokens of the tokenizer, cut to a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptrain import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


IGNORED = -100
"""The label of every token: nothing is learnt token by token."""


@dataclass(frozen=True)
class Cut:
    """The tokens of a text.

    Attributes:
        ids: int32 [n].
        lost: how many more there were.
    """

    ids: np.ndarray
    lost: int


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> dict[str, Cut]:
    """The tokens of each text, by the text; special tokens are among the `length` that are kept.

    Raises:
        DataError: there is no room for a text in so many tokens, or a text has none.
        ModelError: the tokenizer is a slow one.
    """
    import numpy as np

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast"):
        raise ModelError(
            f"the tokenizer ({type(tokenizer).__name__}) is a slow one",
            expected="one with a `tokenizer.json` (a fast tokenizer)",
        )
    special = tokenizer.num_special_tokens_to_add()
    if length <= special:
        raise DataError(
            f"{length} tokens leave no room for a text: {special} of them are special tokens",
            fix="raise `data.max_length`, `data.max_query_length` or `data.max_document_length`",
        )
    unique = list(dict.fromkeys(texts))
    backend.no_padding()
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    found = backend.encode_batch_fast(unique, add_special_tokens=True)
    backend.no_truncation()
    return {
        text: Cut(np.array(one.ids, dtype=np.int32), sum(len(more.ids) - special for more in one.overflowing))
        for text, one in zip(unique, found, strict=True)
    }


def given(tokens: Sequence[Any], query: int, document: int, vocabulary: int, name: str) -> list[Cut]:
    """The tokens of a query and of its documents that others have made, each cut to its length.

    Raises:
        DataError: one is none of the tokenizer's.
    """
    largest = max((int(max(one)) for one in tokens if len(one)), default=0)
    if largest >= vocabulary:
        raise DataError(
            f"{name}: there is a token {largest}, and the tokenizer has {vocabulary}",
            fix="tokenise with the tokenizer of the model, or name the one that was used in `tokenizer.name_or_path`",
        )
    first, *rest = tokens
    return [shortened(first, query), *(shortened(one, document) for one in rest)]


def shortened(ids: Sequence[int], length: int) -> Cut:
    """At most `length` of some tokens; the last one, which ends the text, stays."""
    import numpy as np

    whole = np.array(ids, dtype=np.int32)
    if len(whole) <= length:
        return Cut(whole, 0)
    return Cut(np.concatenate([whole[: length - 1], whole[-1:]]), len(whole) - length)
