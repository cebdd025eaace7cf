"""Rows to token rows: render, tokenise, mask, over-length policy, pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ptrain.data.arrow import blocks, write_batches
from ptrain.data.pack import best_fit, slice_and_pack
from ptrain.data.render import Span, Template, Unrenderable, leading_bos, trainable
from ptrain.data.report import Report
from ptrain.data.rows import ORIGIN, conversations, plain_messages
from ptrain.data.workspace import workspace
from ptrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
Overlength = Literal["error", "drop", "truncate_left", "truncate_right", "split"]


@dataclass
class Tokens:
    """One document: `ids` and `labels` of the same length (not shifted), and the row that it came from."""

    ids: list[int]
    labels: list[int]
    origin: str


def token_schema() -> pa.Schema:
    """The Arrow schema of token rows."""
    import pyarrow as pa

    ints = pa.list_(pa.int32())
    return pa.schema([("input_ids", ints), ("labels", ints), ("document_lengths", ints)])


def write_tokens(rows: Iterable[Sequence[Tokens]], name: str) -> Dataset:
    """Token rows, each of one or more documents, as a memory-mapped Dataset in the workspace."""
    import pyarrow as pa

    def batches() -> Iterator[pa.RecordBatch]:
        for block in blocks(rows):
            columns = {
                "input_ids": [[i for one in row for i in one.ids] for row in block],
                "labels": [[i for one in row for i in one.labels] for row in block],
                "document_lengths": [[len(one.ids) for one in row] for row in block],
            }
            yield pa.RecordBatch.from_pydict(columns, schema=token_schema())

    return write_batches(batches(), token_schema(), workspace().path(f"{name}.arrow"))


def encode_conversations(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    *,
    mask_inputs: bool = True,
    ignore_empty_think: bool = False,
) -> Iterator[Tokens]:
    """The documents of rows with a `messages` column, in their order.

    A token is a label where its characters lie within an assistant turn (its end token included), all are
    without `mask_inputs`. Text is tokenised without special tokens; where the tokenizer itself begins texts
    with BOS and the template does not, one is added.

    Raises:
        DataError: there is no such column, or a conversation can't be rendered; names the row.
    """
    if "messages" not in dataset.column_names:
        raise DataError(
            f"the rows have no column `messages` (they have {dataset.column_names})",
            expected='conversations: {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    template, bos = Template.of(tokenizer), leading_bos(tokenizer)
    for block in _blocks(dataset):
        texts, spans = [], []
        for messages, tools, origin in block:
            text, found = _rendered(template, messages, tools, origin, ignore_empty_think)
            texts.append(text)
            spans.append(found if mask_inputs else [(0, len(text))])
            report.turns += len(found)
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for at, (_, _, origin) in enumerate(block):
            ids = encoded["input_ids"][at]
            labels = mask(ids, encoded["offset_mapping"][at], spans[at])
            if bos is not None and ids[:1] != [bos]:
                ids, labels = [bos, *ids], [IGNORED, *labels]
            yield Tokens(ids, labels, origin)


Row = tuple[list[dict[str, Any]], list[Any] | None, str]


def _blocks(dataset: Dataset, size: int = 500) -> Iterator[list[Row]]:
    import json

    for start in range(0, len(dataset), size):
        table = dataset.with_format("arrow")[start : start + size]
        messages = conversations(table["messages"])
        count = len(messages)
        tools = table["tools"].to_pylist() if "tools" in table.column_names else [None] * count
        names = table[ORIGIN].to_pylist() if ORIGIN in table.column_names else [f"row {start + n}" for n in range(count)]
        block: list[Row] = []
        for said, tool, name in zip(messages, tools, names, strict=True):
            if said is None:
                raise DataError(f"{name}: the row has no `messages`")
            block.append((said, json.loads(tool) if tool else None, name))
        yield block


def _rendered(
    template: Template, messages: list[dict[str, Any]], tools: list[Any] | None, origin: str, ignore_empty_think: bool
) -> tuple[str, list[Span]]:
    try:
        rendered = template.render(plain_messages(messages), tools)
    except Unrenderable as error:
        raise DataError(f"{origin}: {error}", fix="mend the row, or choose another `tokenizer.chat_template`") from error
    return rendered.text, trainable(rendered, messages, ignore_empty_think=ignore_empty_think)


def mask(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Labels of one text: the ids of tokens that lie within a span, -100 elsewhere. Both are in order."""
    labels = [IGNORED] * len(ids)
    at = 0
    for start, stop in spans:
        while at < len(ids) and offsets[at][0] < start:
            at += 1
        while at < len(ids) and offsets[at][1] <= stop:
            if offsets[at][0] < offsets[at][1]:
                labels[at] = ids[at]
            at += 1
    return labels


def encode_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """The documents of rows with a `text` column: BOS and EOS where the tokenizer has them, every token a label.

    Raises:
        DataError: there is no such column.
    """
    if "text" not in dataset.column_names:
        raise DataError(
            f"the rows have no column `text` (they have {dataset.column_names})", expected='{"text": "..."}'
        )
    before = [tokenizer.bos_token_id] if isinstance(tokenizer.bos_token_id, int) else []
    after = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    for start in range(0, len(dataset), 500):
        part = dataset[start : start + 500]
        names = part.get(ORIGIN) or [f"row {start + n}" for n in range(len(part["text"]))]
        for ids, name in zip(tokenizer(part["text"], add_special_tokens=False)["input_ids"], names, strict=True):
            whole = [*before, *ids, *after]
            yield Tokens(whole, list(whole), name)


def fit(
    documents: Iterable[Tokens], max_length: int, policy: Overlength, report: Report, *, max_unsupervised: float = 0.0
) -> list[Tokens]:
    """The documents that fit in `max_length` and have a label, as `policy` says; everything else is counted.

    Raises:
        DataError: one is too long and the policy is "error"; too many have no label; none is left.
    """
    kept: list[Tokens] = []
    for document in documents:
        report.rows += 1
        for piece in _fitted(document, max_length, policy, report):
            # The first token of a document is never predicted.
            if any(label != IGNORED for label in piece.labels[1:]):
                kept.append(piece)
            else:
                report.drop("without a supervised token", document.origin)
    _refuse_overlength(report, max_length, policy)
    _refuse_unsupervised(report, max_unsupervised)
    if report.rows and not kept:
        raise DataError(f"none of the {report.rows} rows is left: " + "; ".join(report.lines()[1:]))
    report.documents += len(kept)
    return kept


TOO_LONG = "longer than max_length"


def _fitted(document: Tokens, max_length: int, policy: Overlength, report: Report) -> Iterator[Tokens]:
    length = len(document.ids)
    if length <= max_length:
        yield document
        return
    report.drop(f"{TOO_LONG} ({policy})", document.origin)
    if policy in ("drop", "error"):
        report.lost_tokens += length
    elif policy == "split":
        for start in range(0, length, max_length):
            stop = start + max_length
            yield Tokens(document.ids[start:stop], document.labels[start:stop], document.origin)
    else:
        report.lost_tokens += length - max_length
        part = slice(length - max_length, None) if policy == "truncate_left" else slice(None, max_length)
        yield Tokens(document.ids[part], document.labels[part], document.origin)


def _refuse_overlength(report: Report, max_length: int, policy: Overlength) -> None:
    count = report.dropped.get(f"{TOO_LONG} (error)", 0)
    if policy == "error" and count:
        names = report.named[f"{TOO_LONG} (error)"]
        raise DataError(
            f"{count} of {report.rows} rows are longer than `data.max_length` ({max_length} tokens): "
            + ", ".join(names) + (", ..." if count > len(names) else ""),
            fix="raise `data.max_length`, or set `data.overlength` to drop, truncate_left, truncate_right or split",
        )  # fmt: skip


def _refuse_unsupervised(report: Report, most: float) -> None:
    reason = "without a supervised token"
    count = report.dropped.get(reason, 0)
    if count > most * report.rows:
        names = report.named[reason]
        raise DataError(
            f"{count} of {report.rows} rows have no supervised token: " + ", ".join(names)
            + (", ..." if count > len(names) else ""),
            expected=f"at most {most:.0%} of the rows (`data.max_unsupervised`)",
            fix="mend the rows or the template, raise `data.max_length`, or set `data.max_unsupervised`",
        )  # fmt: skip


def packed(documents: Sequence[Tokens], max_length: int, report: Report) -> Iterator[list[Tokens]]:
    """Rows of several documents, by best fit; nothing is lost."""
    bins = best_fit([len(one.ids) for one in documents], max_length)
    report.fullness = sum(len(one.ids) for one in documents) / (len(bins) * max_length) if bins else None
    return ([documents[number] for number in one] for one in bins)


def sliced(documents: Sequence[Tokens], max_length: int, report: Report) -> Iterator[list[Tokens]]:
    """Rows of exactly `max_length` tokens; only the last partial row is lost."""
    total = sum(len(one.ids) for one in documents)
    report.lost_tokens += total % max_length
    for row in slice_and_pack((len(one.ids) for one in documents), max_length):
        yield [
            Tokens(documents[n].ids[a:b], documents[n].labels[a:b], documents[n].origin) for n, a, b in row
        ]  # fmt: skip


def counted(dataset: Dataset, report: Report) -> Dataset:
    """`dataset`, with its samples, tokens and labels added to `report`."""
    import pyarrow.compute as pc

    report.samples += len(dataset)
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        table: Any = batch
        report.tokens += pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0
        labels = pc.list_flatten(table["labels"])
        report.supervised_tokens += pc.sum(pc.not_equal(labels, IGNORED)).as_py() or 0
    return dataset


def plain(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Tokens]]:
    """Rows that hold tokens already (`process: false`), as documents of their own."""
    for number, row in enumerate(rows):
        yield [Tokens(list(row["input_ids"]), list(row["labels"]), str(row.get(ORIGIN) or f"row {number}"))]
