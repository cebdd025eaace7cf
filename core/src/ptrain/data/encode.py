"""Text to tokens: ids, and labels by character spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from ptrain.data.bytelevel import token_sizes, within
from ptrain.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from ptrain.data.render import Span

IGNORED = -100


@dataclass
class Tokens:
    """One document: `ids` and `labels`, int32 of the same length, not shifted; -100 where nothing is learnt."""

    ids: np.ndarray
    labels: np.ndarray


class Encoder:
    """Encodes texts as they are: no special tokens are added, nothing is cut or padded.

    Raises:
        ModelError: the tokenizer gives no character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if not hasattr(self._backend, "encode_batch"):
            raise ModelError(
                f"the tokenizer ({type(tokenizer).__name__}) gives no character offsets",
                expected="one with a `tokenizer.json` (a fast tokenizer)",
            )
        self._backend.no_truncation()
        self._backend.no_padding()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [one.ids for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def labelled(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Tokens]:
        """Ids of each text, with the tokens whose characters lie within one of its spans as labels.

        No token reaches over the end of a span: where the tokenizer would merge characters of both sides, the text
        is encoded in parts, as generation does it (the prompt first, then what follows).
        """
        found = self._by_sizes(texts, spans)
        rest = [at for at, one in enumerate(found) if one is None]
        encodings = self._backend.encode_batch([texts[at] for at in rest], add_special_tokens=False)
        for at, encoding in zip(rest, encodings, strict=True):
            found[at] = self._by_offsets(encoding, texts[at], spans[at])
        return found  # type: ignore[return-value]

    @cached_property
    def _sizes(self) -> np.ndarray | None:
        return token_sizes(self._backend)

    def _by_sizes(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Tokens | None]:
        """The same without offsets, which take a quarter of the time of encoding; None for a text that needs them."""
        import numpy as np

        if self._sizes is None:
            return [None] * len(texts)
        encoded = self.ids(texts)
        ids = np.array(list(chain.from_iterable(encoded)), dtype=np.int32)
        firsts = np.cumsum([0, *map(len, encoded)])
        learnt, whole, clear = within(self._sizes[ids], firsts, texts, spans)
        labels = np.where(learnt, ids, np.int32(IGNORED))
        found: list[Tokens | None] = []
        for at, bounds in enumerate(pairwise(firsts.tolist())):
            if not whole[at]:
                found.append(None)
            elif clear[at]:
                found.append(Tokens(ids[slice(*bounds)], labels[slice(*bounds)]))
            else:
                found.append(self._in_parts(encoded[at], texts[at], spans[at]))
        return found

    def _by_offsets(self, encoding: Encoding, text: str, spans: Sequence[Span]) -> Tokens:
        import numpy as np

        ids = np.array(encoding.ids, dtype=np.int32)
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        for span in spans:
            found = _aligned(encoding, span, len(text)) or _searched(encoding.offsets, span)
            if found is None:
                return self._in_parts(encoding.ids, text, spans) or _inside(encoding, spans)
            labels[slice(*found)] = ids[slice(*found)]
        return Tokens(ids, labels)

    def _in_parts(self, whole: list[int], text: str, spans: Sequence[Span]) -> Tokens | None:
        import numpy as np

        cuts = sorted({0, len(text), *(edge for span in spans for edge in span)})
        parts = list(pairwise(cuts))
        pieces = self.ids([text[start:stop] for start, stop in parts])
        if not self._says_the_same([token for piece in pieces for token in piece], whole):
            return None
        ids = np.array([token for piece in pieces for token in piece], dtype=np.int32)
        learnt = np.repeat([part in set(spans) for part in parts], [len(piece) for piece in pieces])
        return Tokens(ids, np.where(learnt, ids, np.int32(IGNORED)))

    def _says_the_same(self, one: list[int], other: list[int]) -> bool:
        """Some tokenizers begin every text with a space; encoding in parts would change what is said."""
        decode = self._backend.decode
        return decode(one, skip_special_tokens=False) == decode(other, skip_special_tokens=False)


def _aligned(encoding: Encoding, span: Span, length: int) -> Span | None:
    """The tokens of a span, if it begins and ends where tokens do; a quick look that may miss."""
    first = encoding.char_to_token(span[0])
    if first is None or encoding.token_to_chars(first)[0] != span[0]:  # type: ignore[index]
        return None
    if span[1] == length:
        return first, len(encoding)
    after = encoding.char_to_token(span[1])
    if after is None or encoding.token_to_chars(after)[0] != span[1]:  # type: ignore[index]
        return None
    return first, after


def _searched(offsets: Sequence[Span], span: Span) -> Span | None:
    """The tokens of a span by all offsets; None where a token reaches over its beginning or end.

    Offsets may leave white space out: a gap belongs to the token behind it.
    """
    begin = end = None
    reached = 0
    for at, (start, stop) in enumerate(offsets):
        start, stop = min(start, reached), max(stop, reached)
        for edge in span:
            if start < edge < stop:
                return None
        if begin is None and stop > span[0]:
            begin = at
        if stop <= span[1]:
            end = at + 1
        reached = stop
    return (begin, end) if begin is not None and end is not None and begin <= end else None


def _inside(encoding: Encoding, spans: Sequence[Span]) -> Tokens:
    """Labels where a token lies within a span with all its characters; one that reaches over is none."""
    import numpy as np

    ids = np.array(encoding.ids, dtype=np.int32)
    edges = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    for start, stop in spans:
        within = (edges[:, 0] >= start) & (edges[:, 1] <= stop) & (edges[:, 0] < edges[:, 1])
        labels[within] = ids[within]
    return Tokens(ids, labels)
