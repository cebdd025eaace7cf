"""The special tokens of a tokenizer, as they stand in text."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEVER = "(?!)"
"""A pattern that matches nothing."""


class SpecialTokens:
    """Where special tokens stand in a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        tokens = {str(token) for token in added if token.special} | {str(t) for t in tokenizer.all_special_tokens}
        self.tokens = tuple(sorted(tokens - {""}, key=lambda token: (-len(token), token)))
        self._tokenizer = tokenizer
        # Asking a tokenizer for one of its tokens takes longer than rendering a message.
        self._bos = str(tokenizer.bos_token) if tokenizer.bos_token else ""

    @cached_property
    def one(self) -> re.Pattern[str]:
        """Matches any one of them."""
        return re.compile("|".join(map(re.escape, self.tokens)) or NEVER)

    def ends(self, text: str, span: tuple[int, int]) -> bool:
        """Whether a part of `text` ends in one."""
        return text.endswith(self.tokens, *span)

    def strip(self, text: str) -> str:
        """`text` without the white space and special tokens at its end."""
        while True:
            shorter = text.rstrip()
            token = next((token for token in self.tokens if shorter.endswith(token)), None)
            if token is None:
                return shorter
            text = shorter[: -len(token)]

    def one_bos(self, text: str) -> tuple[str, int]:
        """`text` with exactly one BOS (if the tokenizer uses one), and by how much that moved it."""
        bos = self._bos
        if not bos:
            return text, 0
        length = len(text)
        while text.startswith(bos + bos):
            text = text[len(bos) :]
        if self._adds_bos and not text.startswith(bos):
            text = bos + text
        return text, len(text) - length

    @cached_property
    def _adds_bos(self) -> bool:
        return adds_bos(self._tokenizer)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts BOS before a text."""
    bos = tokenizer.bos_token_id
    return isinstance(bos, int) and tokenizer("a").input_ids[:1] == [bos]
