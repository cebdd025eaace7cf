"""Preference rows to token rows: a pair is one row of two documents, the chosen conversation and the rejected one.

Documents of a row never see each other, so a pair needs no padding between its two halves, and everything that core
does with rows (order, accumulation, resume, evaluation) holds for pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field, model_validator

import ptrain
from ptrain import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    from ptrain import Run
    from ptrain.data.documents import Documents
    from ptrain.data.report import Report

Message = dict[str, Any]
Half = tuple["np.ndarray", "np.ndarray"]
"""`(ids, labels)` of one conversation of a pair."""
TOO_LONG = "longer than max_length"
SAME = "with the same answer as chosen and rejected"
IGNORED = -100


class DPOData(ptrain.DataConfig):
    """The `data` section of `dpo`."""

    max_prompt_length: Annotated[int, Field(ge=1)] | None = None
    """With `overlength: truncate`, what is left of the prompt of a pair that is too long, in tokens; by default half of
    `max_length`."""
    dpo_prompt_truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    """Which end of such a prompt is kept."""
    overlength: Literal["error", "drop", "truncate"] | None = None
    """What becomes of pairs with a conversation longer than `max_length`: an error that counts them (the default), or
    they are left out, or their prompt is cut and then the end of the answer. No answer is ever cut away whole."""

    @property
    def longest_row(self) -> int:
        """The most tokens of a pair: its two conversations."""
        return 2 * self.max_length

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> Any:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"`max_prompt_length` ({self.max_prompt_length}) leaves no room for an answer in `max_length` "
                f"({self.max_length})"
            )
        return self

    @model_validator(mode="after")
    def _padding_of_pairs(self) -> Any:
        if self.pad_to == "max_length":
            raise ValueError("`pad_to: max_length` is not for pairs: a row holds two conversations of any length")
        return self


def process_pairs(run: Run, split: str, dataset: Dataset) -> Dataset:
    """Token rows of pairs: `document_lengths` of a row are those of its chosen and of its rejected conversation.

    Labels are what the assistant says in the answers, with the token that ends its turn; the prompt has none.

    Raises:
        DataError: a row is no pair, can't be rendered, or is too long.
    """
    from ptrain.data.arrow import open_arrow, write_batches, write_rows
    from ptrain.data.documents import token_schema
    from ptrain.data.process import counted, encode_conversations
    from ptrain.data.report import Report
    from ptrain.data.workspace import workspace

    data, report = cast(DPOData, run.recipe.data), workspace().report(split)
    names: list[str] = []
    rows = write_rows(conversations(dataset, names, report), workspace().path(f"{split}-conversations.arrow"))
    if not len(rows):
        raise DataError(f"none of the {report.rows} pairs is left: " + "; ".join(report.lines()[1:]))
    documents = encode_conversations(rows, run.tokenizer, Report())
    batches = _batches(fitted(documents, names, data, report))
    found = open_arrow(write_batches(batches, token_schema(), workspace().path(f"{split}.arrow")))
    if count := report.dropped.get(f"{TOO_LONG} (error)", 0):
        raise DataError(
            f"{count} of {report.rows} pairs are longer than `data.max_length` ({data.max_length} tokens): "
            + ", ".join(report.named[f"{TOO_LONG} (error)"]),
            fix="raise `data.max_length`, or set `data.overlength` to drop or truncate",
        )
    return counted(found, report)


def conversations(dataset: Dataset, names: list[str], report: Report) -> Iterator[dict[str, Any]]:
    """The chosen and the rejected conversation of each pair, in turn; `names` gets what the pairs are called.

    Raises:
        DataError: names the row that is no pair.
    """
    from ptrain.data.reading import row_names
    from ptrain.data.rows import ORIGIN, TOOLS

    first = 0
    table: Any
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for row, name in zip(_rows(table), row_names(table, first), strict=True):
            report.rows += 1
            prompt, chosen, rejected = pair(row, name)
            if chosen == rejected:
                report.drop(SAME, name)
                continue
            names.append(name)
            for which, answer in (("chosen", chosen), ("rejected", rejected)):
                messages = [{**message, "train": False} for message in prompt] + answer
                yield {"messages": messages, TOOLS: row.get(TOOLS), ORIGIN: f"{name} ({which})"}
        first += len(table)


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    from ptrain.data.rows import TOOLS, message_type
    from ptrain.data.rows import conversations as read

    columns = {
        name: read(table[name]) if table[name].type == message_type() else table[name].to_pylist()
        for name in ("prompt", "chosen", "rejected", TOOLS)
        if name in table.column_names
    }
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def pair(row: dict[str, Any], name: str) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected answer of a row, as messages.

    Text is a turn of the user, and of the assistant. Where `chosen` and `rejected` are whole conversations, what
    both begin with is the prompt.

    Raises:
        DataError: a column is missing, or there is no answer or no prompt.
    """
    chosen, rejected = (_messages(row, key, "assistant", name) for key in ("chosen", "rejected"))
    if chosen[0]["role"] == "assistant" or rejected[0]["role"] == "assistant":
        prompt = _messages(row, "prompt", "user", name)
    else:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and _said(chosen[shared]) == _said(rejected[shared]):
            shared += 1
        # The same answer in both is an answer still: the pair is left out for that.
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[0]["role"] != "assistant":
            raise DataError(
                f"{name}: the answer in `{key}` begins with a message of the role `{answer[0]['role']}`",
                expected="the assistant's, after a prompt that both conversations share",
            )
    if not prompt:
        raise DataError(f"{name}: the conversations in `chosen` and `rejected` share no prompt")
    return prompt, chosen, rejected


def _said(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


def _messages(row: dict[str, Any], key: str, role: str, name: str) -> list[Message]:
    value = row.get(key)
    if not value:
        raise DataError(
            f"{name}: `{key}` is {'missing' if value is None else 'empty'}",
            expected="`prompt`, `chosen` and `rejected`, as text or messages; or whole conversations as the last two",
        )
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def fitted(documents: Documents, names: Sequence[str], data: DPOData, report: Report) -> Iterator[list[Half]]:
    """The pairs as two documents each, cut or left out where they are too long, and counted."""
    policy = data.overlength or "error"
    for number, name in enumerate(names):
        halves = [documents.piece((at, 0, int(documents.lengths[at]))) for at in (2 * number, 2 * number + 1)]
        if max(len(ids) for ids, _ in halves) > data.max_length:
            report.drop(f"{TOO_LONG} ({policy})", name)
            if policy != "truncate":
                continue
            before = sum(len(ids) for ids, _ in halves)
            halves = [cut(half, data) for half in halves]
            report.lost_tokens += before - sum(len(ids) for ids, _ in halves)
        report.documents += 1
        yield halves


def cut(half: Half, data: DPOData) -> Half:
    """A conversation of at most `max_length` tokens: the prompt is cut first, then the end of the answer.

    Both halves of a pair are cut alike, so that they keep one prompt.
    """
    import numpy as np

    ids, labels = half
    start = int(np.argmax(labels != IGNORED))
    room = data.max_prompt_length or data.max_length // 2
    kept = min(start, room)
    prompt = slice(0, kept) if data.dpo_prompt_truncation_mode == "keep_start" else slice(start - kept, start)
    answer = slice(start, start + data.max_length - kept)
    return tuple(np.concatenate([one[prompt], one[answer]]) for one in (ids, labels))  # type: ignore[return-value]


def _batches(rows: Iterator[list[Half]]) -> Iterator[pa.RecordBatch]:
    from ptrain.data.arrow import blocks
    from ptrain.data.documents import token_batch

    return map(token_batch, blocks(rows))
