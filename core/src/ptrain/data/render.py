"""Conversations to text and assistant spans: the one function that training, evaluation and generation share.

Spans come from the template itself, never from searching text: from its `{% generation %}` markers, or by
rendering the conversation turn by turn and checking that each rendering is a prefix of the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from ptrain.data.arrow import blocks
from ptrain.data.rows import plain_messages
from ptrain.data.special import SpecialTokens
from ptrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "ptrainprobe"
TOGETHER = 25
"""So many conversations are written by one call: it has its own cost, and the objects of many keep the garbage
collector busy."""

Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Any] | None


class Unrenderable(ValueError):
    """A template can't render a conversation, or not so that the assistant's turns can be told."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: what the template wrote, with exactly one BOS if the tokenizer uses one.
        spans: `(start, stop)` in `text` of what the assistant says and of the token that ends its turn.
        unended: how many of the spans do not end in a special token.
    """

    text: str
    spans: list[Span]
    unended: int = 0


class Template:
    """The chat template of a tokenizer.

    Raises:
        DataError: the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template", fix="set `tokenizer.chat_template`, e.g. to `chatml`")
        self.tokenizer = tokenizer
        self._special = SpecialTokens(tokenizer)
        self._variables: dict[str, Any] = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self._eos = str(tokenizer.eos_token)
        self._checked: dict[str, bool] = {}
        self._texts: dict[bool, str] = {}
        self._marks: dict[bool, bool] = {}

    def render(self, messages: Messages, tools: Tools = None, *, ignore_empty_think: bool = False) -> Rendered:
        """Text and assistant spans of canonical messages.

        A message with `train: false` gives no span. With `ignore_empty_think` a `<think></think>` without
        thoughts at the beginning of a span is left out of it.

        Raises:
            Unrenderable: the template refuses the conversation, leaves a message out, or is neither marked nor
                prefix-stable.
        """
        return self._together([messages], tools, ignore_empty_think)[0]

    def render_all(self, rows: Iterable[tuple[Messages, Tools]], *, ignore_empty_think: bool = False) -> list[Rendered]:
        """The same of several conversations; those without tools, one after another, take less time together."""
        found: list[Rendered] = []
        for has_tools, group in groupby(rows, key=lambda row: bool(row[1])):
            if has_tools:
                found += [self.render(*row, ignore_empty_think=ignore_empty_think) for row in group]
                continue
            for some in blocks(group, TOGETHER):
                found += self._together([messages for messages, _ in some], None, ignore_empty_think)
        return found

    def _together(self, rows: list[Messages], tools: Tools, ignore_empty_think: bool) -> list[Rendered]:
        plain = [self._plain(messages) for messages in rows]
        for messages in plain:
            self._check_complete(messages)
        if self._has_marks(tools):
            written = self._write_all(plain, tools, marked=True)
            found = [
                (text, self._marked(text, spans, messages))
                for (text, spans), messages in zip(written, plain, strict=True)
            ]
        else:
            found = [self._incremental(messages, tools) for messages in plain]
        return [
            self._rendered(text, spans, messages, ignore_empty_think)
            for (text, spans), messages in zip(found, rows, strict=True)
        ]

    def _rendered(self, text: str, spans: list[Span], messages: Messages, ignore_empty_think: bool) -> Rendered:
        text, shift = self._special.one_bos(text)
        kept = _trained([(start + shift, stop + shift) for start, stop in spans], messages)
        if ignore_empty_think:
            kept = [_without_empty_think(text, span) for span in kept]
        kept = [(start, stop) for start, stop in kept if start < stop]
        return Rendered(text, kept, sum(not self._special.ends(text, span) for span in kept))

    def prompt(self, messages: Messages, tools: Tools = None) -> str:
        """The text after which the assistant's next turn begins.

        Raises:
            Unrenderable: the template refuses the conversation.
        """
        return self._special.one_bos(self._write(self._plain(messages), tools, prompt=True))[0]

    def written(self, messages: Messages) -> str:
        """What the template itself makes of messages, BOS or not."""
        return self._write(self._plain(messages), None)

    def _plain(self, messages: Messages) -> list[dict[str, Any]]:
        return plain_messages(messages, self._objects)

    def _text(self, tools: Tools) -> str:
        key = bool(tools)
        if key not in self._texts:
            self._texts[key] = self.tokenizer.get_chat_template(None, tools=list(tools) if tools else None)
        return self._texts[key]

    def _has_marks(self, tools: Tools) -> bool:
        key = bool(tools)
        if key not in self._marks:
            self._marks[key] = MARKER.search(self._text(tools)) is not None
        return self._marks[key]

    def mentions(self, name: str) -> bool:
        """Whether the template reads a variable or function at all."""
        return name in self._text([{}])

    # Spans

    def _marked(self, text: str, found: Sequence[Span], messages: Messages) -> list[Span]:
        """The marked spans, each with the token that ends the turn where it stands behind the mark."""
        ends = {self._eos}
        if found and messages[-1]["role"] == "assistant" and (last := self._special.one.match(text, found[-1][1])):
            ends.add(last.group())
        spans = []
        for start, stop in found:
            stop = self._trimmed(text, start, stop)
            if not self._special.ends(text, (start, stop)):
                after = self._special.one.match(text, stop)
                stop = after.end() if after is not None and after.group() in ends else stop
            spans.append((start, stop))
        return spans

    def _trimmed(self, text: str, start: int, stop: int) -> int:
        """`stop` without the white space that follows a special token."""
        shorter = start + len(text[start:stop].rstrip())
        return shorter if self._special.ends(text, (start, shorter)) else stop

    def _incremental(self, messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        whole = self._write(messages, tools)
        spans = []
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                after = whole if at == len(messages) - 1 else self._write(messages[: at + 1], tools)
                start = self._start(messages[:at], tools, whole, after, at)
                spans.append((start, self._stop(whole, after, start, at)))
        return whole, spans

    def _start(self, before: Messages, tools: Tools, whole: str, after: str, at: int) -> int:
        """Where message `at` begins to be the assistant's: behind the generation prompt."""
        prompt = self._write(before, tools, prompt=True)
        if whole.startswith(prompt) and after.startswith(prompt):
            return len(prompt)
        # A generation prompt may add what a finished turn lacks (an opened think block): keep what they share,
        # up to a special token or the end of a line.
        body = self._write(before, tools) if before else ""
        shared = _common(_common(prompt, whole), after)
        cuts = [m.end() for m in re.finditer(f"{self._special.one.pattern}|\n", shared) if m.end() > len(body)]
        if not shared.startswith(body) or not cuts:
            raise _unstable(at)
        return cuts[-1]

    def _stop(self, whole: str, after: str, start: int, at: int) -> int:
        """Where the turn that ends `after` ends in `whole`: behind its end token, before white space."""
        said = start + len(self._special.strip(after[start:]))
        if not whole.startswith(after[:said]):
            raise _unstable(at)
        specials = list(self._special.one.finditer(after, said))
        if not specials:
            # Without an end token, the white space that separates turns is what ends this one.
            return len(after) if whole.startswith(after) else said
        ends = [specials[0].end()]
        for earlier, later in pairwise(specials):
            if later.start() != earlier.end():
                break
            ends.append(later.end())
        agreed = [end for end in ends if whole.startswith(after[said:end], said)]
        if not agreed:
            raise _unstable(at)
        return agreed[-1]

    # What the template does with a message

    @cached_property
    def _objects(self) -> bool:
        """Whether the template wants the arguments of tool calls as objects; otherwise they are JSON text."""
        arguments = {PROBE: PROBE}
        text = self._probe([_user(), _call(arguments)])
        if text is None:
            return self._probe([_user(), _call(json.dumps(arguments))]) is None
        return repr(arguments) not in text

    def _check_complete(self, messages: Messages) -> None:
        """Raise Unrenderable where the template leaves out a role or tool calls altogether."""
        for message in messages:
            for kind in (message["role"], "tool_calls") if "tool_calls" in message else (message["role"],):
                if kind not in self._checked:
                    self._checked[kind] = self._writes(kind)
                if not self._checked[kind]:
                    what = "tool calls" if kind == "tool_calls" else f"messages of the role `{kind}`"
                    raise Unrenderable(f"the chat template leaves {what} out")

    def _writes(self, kind: str) -> bool:
        said = {"role": kind, "content": PROBE}
        call = _call({} if self._objects else "{}")
        if kind == "tool_calls":
            text = self._probe([_user(), call])
        elif kind in ("system", "developer"):
            text = self._probe([said, _user()])
        elif kind in ("tool", "function", "ipython"):
            text = self._probe([_user(), call, {**said, "name": "f", "tool_call_id": "abcdefghi"}])
            plain = self._probe([_user(), call])
            return text is None or plain is None or text.count(PROBE) > plain.count(PROBE)
        else:
            text = self._probe([_user(), said] if kind == "assistant" else [said])
        return text is None or PROBE in text

    def _probe(self, messages: Messages) -> str | None:
        try:
            return self._write(messages, None)
        except Unrenderable:
            return None

    def _write(self, messages: Messages, tools: Tools, *, prompt: bool = False) -> str:
        return self._write_all([messages], tools, prompt=prompt)[0][0]

    def _write_all(
        self, rows: Sequence[Messages], tools: Tools, *, prompt: bool = False, marked: bool = False
    ) -> list[tuple[str, list[Span]]]:
        """The texts of conversations, with their marked spans."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # What it says it returns is not what it returns.
            found: Any = render_jinja_template(
                [[dict(message) for message in messages] for messages in rows],
                tools=list(tools) if tools else None,
                chat_template=self._text(tools),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise Unrenderable(f"the chat template can't render it: {error}") from error
        texts, spans = found
        return list(zip(texts, spans if marked else [[] for _ in texts], strict=True))


def _unstable(at: int) -> Unrenderable:
    return Unrenderable(
        f"the chat template writes messages[{at}] differently once later messages follow, so its tokens can't be told "
        "from the others"
    )


def _trained(spans: list[Span], messages: Messages) -> list[Span]:
    turns = [message for message in messages if message["role"] == "assistant"]
    if all(turn.get("train") is not False for turn in turns):
        return spans
    if len(turns) != len(spans):
        raise Unrenderable(
            f"the chat template marks {len(spans)} spans for {len(turns)} assistant messages, so `train: false` "
            "can't be matched to one"
        )
    return [span for span, turn in zip(spans, turns, strict=True) if turn.get("train") is not False]


def _without_empty_think(text: str, span: Span) -> Span:
    empty = EMPTY_THINK.match(text, *span)
    return (empty.end(), span[1]) if empty else span


def _common(one: str, other: str) -> str:
    """The longest common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[:middle]) else (low, middle - 1)
    return one[:low]


def _user() -> dict[str, Any]:
    return {"role": "user", "content": "a"}


def _call(arguments: Any) -> dict[str, Any]:
    function = {"name": f"{PROBE}call", "arguments": arguments}
    return {
        "role": "assistant", "content": "",
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
    }  # fmt: skip
