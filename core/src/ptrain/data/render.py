"""Conversations to text and assistant spans: the one function that training, evaluation and generation share.

Spans come from the template itself, never from searching text: from its `{% generation %}` markers, or by
rendering the conversation turn by turn and checking that each rendering is a prefix of the next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class Unrenderable(ValueError):
    """A template can't render a conversation, or not so that the assistant's turns can be told."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: what the template wrote.
        spans: for each assistant message its `(start, stop)` in `text`, with the end of the turn.
    """

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class Template:
    """A chat template with its tokenizer's special tokens.

    Attributes:
        tokenizer: whose `chat_template` it is.
        marked: whether it has `{% generation %}` markers.
    """

    tokenizer: PreTrainedTokenizerBase
    marked: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template of a tokenizer.

        Raises:
            DataError: it has none.
        """
        text = tokenizer.chat_template
        if not isinstance(text, str):
            raise DataError(
                "the tokenizer has no chat template", fix="set `tokenizer.chat_template`, e.g. to `chatml`"
            )
        return cls(tokenizer, MARKER.search(text) is not None)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> Rendered:
        """Text and assistant spans of a conversation.

        Raises:
            Unrenderable: the template refuses it, or is not prefix-stable.
        """
        if self.marked:
            text, spans = self._write(messages, tools, generation_indices=True)
            return Rendered(text, [(start, stop) for start, stop in spans])
        return self._incremental(messages, tools)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """The text after which the assistant's next turn begins."""
        return self._write(messages, tools, add_generation_prompt=True)[0]

    def _incremental(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> Rendered:
        whole, _ = self._write(messages, tools)
        spans = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.prompt(messages[:at], tools) if at else ""
            after = whole if at == len(messages) - 1 else self._write(messages[: at + 1], tools)[0]
            if not at or not whole.startswith(before) or not whole.startswith(after):
                before = self._without_prompt(messages[:at], tools, whole, after, at)
            spans.append((len(before), len(before) + self._turn(after[len(before) :])))
        return Rendered(whole, spans)

    def _without_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, whole: str, after: str, at: int
    ) -> str:
        """The text before a turn that does not begin with the generation prompt (or opens the conversation)."""
        before = self._write(messages, tools)[0] if messages else ""
        if whole.startswith(after) and after.startswith(before) and messages:
            header = self.prompt(messages, tools)[len(before) :]
            # A generation prompt may add what a rendered turn lacks (an empty think block): keep what they share.
            shared = next((n for n in range(len(header), 0, -1) if after.startswith(before + header[:n])), 0)
            if shared:
                return before + header[:shared]
        raise Unrenderable(
            f"the chat template renders message {at} differently once later messages follow, so its tokens "
            "can't be told from the others"
        )

    def _turn(self, text: str) -> int:
        """How much of the text after a prompt is the turn: up to its end token, without white space after it."""
        trimmed = text.rstrip()
        return len(trimmed) if any(trimmed.endswith(token) for token in self._special()) else len(text)

    def _special(self) -> list[str]:
        return [str(token) for token in self.tokenizer.get_added_vocab()]

    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool = False,
        generation_indices: bool = False,
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        special = {k: v for k, v in self.tokenizer.special_tokens_map.items() if isinstance(v, str)}
        try:
            texts, indices = render_jinja_template(
                [[dict(message) for message in messages]],
                tools=list(tools) if tools else None,
                chat_template=str(self.tokenizer.chat_template),
                return_assistant_tokens_mask=generation_indices,
                add_generation_prompt=add_generation_prompt,
                **special,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise Unrenderable(f"the chat template can't render it: {error}") from error
        return texts[0], (indices[0] if generation_indices else [])


def trainable(
    rendered: Rendered, messages: Sequence[Mapping[str, Any]], *, ignore_empty_think: bool = False
) -> list[Span]:
    """The spans to learn: assistant turns whose message does not say `train: false`.

    With `ignore_empty_think` a leading `<think></think>` without thoughts is left out of its span.
    """
    turns = [message for message in messages if message["role"] == "assistant"]
    chosen = []
    for at, (start, stop) in enumerate(rendered.spans):
        if len(turns) == len(rendered.spans) and turns[at].get("train") is False:
            continue
        if ignore_empty_think and (empty := EMPTY_THINK.match(rendered.text, start, stop)):
            start = empty.end()
        if start < stop:
            chosen.append((start, stop))
    return chosen


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the BOS token if the tokenizer itself puts one before a text."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a").input_ids
    return bos if isinstance(bos, int) and ids[:1] == [bos] else None
