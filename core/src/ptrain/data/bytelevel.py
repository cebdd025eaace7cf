"""Where tokens stand in a text, by the bytes that each of them stands for: faster than asking for their offsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from unicodedata import is_normalized

if TYPE_CHECKING:
    import numpy as np

    from ptrain.data.render import Span

UNCHANGED = (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []})
"""Normalizers that leave text in NFC as it is."""
SPLITTING = {"Split", "Digits", "Punctuation"}
"""Pre-tokenizers that add nothing to a text."""


def token_sizes(backend: Any) -> np.ndarray | None:
    """The bytes of each token by its id, int64; None where they might be others than those of the text.

    With these rules a tokenizer can leave bytes of a text in NFC out, but never add any: as many as the text has are
    those of the text.
    """
    import numpy as np
    from tokenizers import models, pre_tokenizers

    model, vocabulary = backend.model, backend.get_vocab(with_added_tokens=False)
    *before, last = _parts(backend.pre_tokenizer)
    sure = (
        isinstance(model, models.BPE)
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and _state(backend.normalizer) in UNCHANGED
        and {part["type"] for part in before} <= SPLITTING
        and last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        # No byte is unknown, ...
        and set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys()
        # ... and offsets would not leave white space out.
        and '"trim_offsets":true' not in json.dumps(_state(backend.post_processor), separators=(",", ":"))
    )
    if not sure:
        return None
    # A character of the vocabulary is a byte; added tokens are text.
    added = {number: token.content.encode() for number, token in backend.get_added_tokens_decoder().items()}
    sizes = np.zeros(max([*vocabulary.values(), *added]) + 1, dtype=np.int64)
    sizes[list(vocabulary.values())] = [len(token) for token in vocabulary]
    sizes[list(added)] = [len(token) for token in added.values()]
    return sizes


def _state(part: Any) -> Any:
    """A part of a tokenizer as plain data."""
    return None if part is None else json.loads(part.__getstate__())


def _parts(pre_tokenizer: Any) -> list[Any]:
    state = _state(pre_tokenizer) or {"type": None}
    return state.get("pretokenizers") or [state]


def within(
    sizes: np.ndarray, firsts: np.ndarray, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tokens lie within the spans of their text.

    Args:
        sizes: of the tokens of all texts, one after another, in bytes.
        firsts: the first token of each text, and the end of the last one.
        texts: the texts.
        spans: of each of them.

    Returns:
        `[tokens]` whether a token does, which holds for texts for which both others are true; `[texts]` whether the
        tokens are the whole text; `[texts]` whether no token reaches over the edge of a span.
    """
    import numpy as np

    edges = np.concatenate([[0], np.cumsum(sizes)])
    begins = edges[firsts]
    whole = np.diff(begins) == [_size(text) for text in texts]
    owners = np.repeat(np.arange(len(texts)), [len(one) for one in spans])
    pairs = [_in_bytes(text, span) for text, some in zip(texts, spans, strict=True) for span in some]
    wanted = np.array(pairs, dtype=np.int64).reshape(-1, 2) + begins[owners, None]
    found = np.searchsorted(edges, wanted)
    at_edges = (edges[np.minimum(found, len(sizes))] == wanted).all(axis=1)
    clear = np.ones(len(texts), dtype=bool)
    clear[owners[~at_edges]] = False
    begun, ended = (np.bincount(one, minlength=len(edges)) for one in found[at_edges & whole[owners]].T)
    return np.cumsum(begun - ended)[:-1] > 0, whole, clear


def _size(text: str) -> int:
    """The bytes of a text in NFC; -1 of another, which a normalizer may change."""
    if text.isascii():
        return len(text)
    return len(text.encode()) if is_normalized("NFC", text) else -1


def _in_bytes(text: str, span: Span) -> Span:
    if text.isascii():
        return span
    start = len(text[: span[0]].encode())
    return start, start + len(text[slice(*span)].encode())
