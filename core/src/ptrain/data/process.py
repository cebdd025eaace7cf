"""Rows to documents: render, tokenise, mask, over-length policy. Every row that is not kept is counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ptrain.data.documents import Documents
from ptrain.data.encode import IGNORED, Encoder, Tokens
from ptrain.data.reading import conversation_rows, given_tokens, row_names
from ptrain.data.render import Rendered, Template, Unrenderable
from ptrain.data.report import Report
from ptrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Overlength = Literal["error", "drop", "truncate_left", "truncate_right", "split"]
TOO_LONG = "longer than max_length"
UNSUPERVISED = "without a supervised token"


@dataclass(frozen=True)
class Job:
    """How rows become documents: plain data, so that another process can do it.

    Attributes:
        kind: what the rows are.
        max_length: the longest document, in tokens; None takes any.
        overlength: what becomes of longer ones.
        mask_inputs: learn assistant turns alone; otherwise every token.
        ignore_empty_think: see `Template.render`.
    """

    kind: Literal["conversations", "texts"]
    max_length: int | None = None
    overlength: Overlength = "error"
    mask_inputs: bool = True
    ignore_empty_think: bool = False

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def encode_conversations(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    *,
    max_length: int | None = None,
    overlength: Overlength = "error",
    mask_inputs: bool = True,
    ignore_empty_think: bool = False,
    max_unsupervised: float = 0.0,
) -> Documents:
    """The documents of rows with a `messages` column, in their order; all that is not kept is in `report`.

    Rows that hold `input_ids` and `labels` (`process: false`) are taken as they are.

    Raises:
        DataError: a row can't be rendered, is too long (policy "error"), or too many have no supervised token.
    """
    from ptrain.data.shards import encode

    if not {"messages", "input_ids"} & set(dataset.column_names):
        raise DataError(
            f"the rows have no column `messages` (they have {dataset.column_names})",
            expected='conversations: {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    job = Job("conversations", max_length, overlength, mask_inputs, ignore_empty_think)
    documents = encode(dataset, tokenizer, job, report)
    if max_length is not None and overlength == "error":
        _refuse_overlength(report, max_length)
    _refuse_unsupervised(report, max_unsupervised)
    return _any_left(documents, report)


def encode_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, report: Report) -> Documents:
    """The documents of rows with a `text` column: BOS and EOS where the tokenizer has them, every token a label.

    Rows that hold `input_ids` and `labels` (`process: false`) are taken as they are.

    Raises:
        DataError: there is no such column, or a row has no text.
    """
    from ptrain.data.shards import encode

    if not {"text", "input_ids"} & set(dataset.column_names):
        raise DataError(
            f"the rows have no column `text` (they have {dataset.column_names})", expected='{"text": "..."}'
        )
    return _any_left(encode(dataset, tokenizer, Job("texts"), report), report)


class Work:
    """A job with the tokenizer that it needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, job: Job) -> None:
        self.job = job
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        self._template = Template(tokenizer) if job.kind == "conversations" else None
        self._bos = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else None
        self._eos = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None

    def documents(self, table: pa.Table, first: int) -> tuple[list[Tokens], Report]:
        """The documents of some rows, of which the first has the number `first`, and what was counted.

        Raises:
            DataError: names the row.
        """
        report = Report(rows=len(table))
        names = row_names(table, first)
        given = given_tokens(table, names)
        wanted = [at for at, one in enumerate(given) if one is None]
        if wanted:
            made = self._conversations if self._template is not None else self._texts
            rest = table.take(wanted) if len(wanted) < len(table) else table
            for at, tokens in zip(wanted, made(rest, [names[at] for at in wanted], report), strict=True):
                given[at] = tokens
        made_here, kept = set(wanted), []
        for at, (name, tokens) in enumerate(zip(names, given, strict=True)):
            for piece in self._kept(tokens, name, report):  # type: ignore[arg-type]
                kept.append(piece)
                if at not in made_here:
                    report.given(int(max(piece.ids.max(), piece.labels.max())), name)
        report.documents = len(kept)
        return kept, report

    def _conversations(self, table: pa.Table, names: list[str], report: Report) -> list[Tokens]:
        rendered = self._rendered(table, names, report)
        texts = [one.text for one in rendered]
        spans = [one.spans if self.job.mask_inputs else [(0, len(one.text))] for one in rendered]
        return self._encoder.labelled(texts, spans)

    def _rendered(self, table: pa.Table, names: list[str], report: Report) -> list[Rendered]:
        template = self._template
        assert template is not None
        try:
            rows = [(messages, tools) for messages, tools, _ in conversation_rows(table, names)]
            found = template.render_all(rows, ignore_empty_think=self.job.ignore_empty_think)
        except (DataError, Unrenderable):
            # One by one, the first that is wrong is named.
            for row in conversation_rows(table, names):
                self._render_alone(template, *row)
            raise
        for (_, tools), one in zip(rows, found, strict=True):
            report.turns += len(one.spans)
            report.unended_turns += one.unended
            if tools and not template.mentions("tools"):
                report.note("the chat template leaves the column `tools` out")
            if template.mentions("strftime_now"):
                report.note("the chat template may write the date: prepared on another day, the rows may differ")
        return found

    def _render_alone(self, template: Template, messages: list[dict[str, Any]], tools: Any, name: str) -> None:
        try:
            template.render(messages, tools, ignore_empty_think=self.job.ignore_empty_think)
        except Unrenderable as error:
            raise DataError(
                f"{name}: {error}",
                fix="mend the row, mark the assistant's words in the template with `{% generation %}`, or choose "
                "another `tokenizer.chat_template`, e.g. `chatml`",
            ) from error

    def _texts(self, table: pa.Table, names: list[str], report: Report) -> list[Tokens]:
        import numpy as np

        texts = table["text"].to_pylist()
        for text, name in zip(texts, names, strict=True):
            if not isinstance(text, str):
                raise DataError(f"{name}: `text` is {text!r}", expected="text")
        before, after = ([token] if token is not None else [] for token in (self._bos, self._eos))
        whole = [np.array([*before, *ids, *after], dtype=np.int32) for ids in self._encoder.ids(texts)]
        return [Tokens(ids, ids) for ids in whole]

    def _kept(self, tokens: Tokens, name: str, report: Report) -> Iterator[Tokens]:
        """What is left of a document: all of it, as a rule."""
        pieces = list(self._fitted(tokens, name, report))
        supervised = [piece for piece in pieces if (piece.labels[1:] != IGNORED).any()]
        if pieces and not supervised:
            report.drop(UNSUPERVISED, name)
        elif len(supervised) < len(pieces):
            report.drop(f"pieces {UNSUPERVISED}", name, len(pieces) - len(supervised))
        yield from supervised

    def _fitted(self, tokens: Tokens, name: str, report: Report) -> Iterator[Tokens]:
        size, length = self.job.max_length, len(tokens.ids)
        if size is None or length <= size:
            yield tokens
            return
        policy = self.job.overlength
        report.drop(f"{TOO_LONG} ({policy})", name)
        if policy == "split":
            yield from _split(tokens, size)
            return
        report.lost_tokens += length - size if policy.startswith("truncate") else length
        if policy == "truncate_right":
            yield Tokens(tokens.ids[:size], tokens.labels[:size])
        elif policy == "truncate_left":
            yield self._last(tokens, size)

    def _last(self, tokens: Tokens, size: int) -> Tokens:
        """The last `size` tokens; BOS stays in front."""
        import numpy as np

        if self._bos is None or tokens.ids[0] != self._bos or size == 1:
            return Tokens(tokens.ids[-size:], tokens.labels[-size:])
        ids, labels = ([one[:1], one[1 - size :]] for one in (tokens.ids, tokens.labels))
        return Tokens(np.concatenate(ids), np.concatenate(labels))


def _split(tokens: Tokens, size: int) -> Iterator[Tokens]:
    """Pieces of at most `size` tokens. Each begins with the last token of the one before, which is not learnt
    again: so that every label is predicted from the token before it, exactly once."""
    start = 0
    while True:
        stop = start + size
        labels = tokens.labels[start:stop].copy()
        if start:
            labels[0] = IGNORED
        yield Tokens(tokens.ids[start:stop], labels)
        if stop >= len(tokens.ids):
            return
        start = stop - min(1, size - 1)


def _any_left(documents: Documents, report: Report) -> Documents:
    if report.rows and not len(documents):
        raise DataError(f"none of the {report.rows} rows is left: " + "; ".join(report.lines()[1:]))
    return documents


def _listed(report: Report, reason: str) -> str:
    names = report.named[reason]
    return ", ".join(names) + (", ..." if report.dropped[reason] > len(names) else "")


def _refuse_overlength(report: Report, max_length: int) -> None:
    reason = f"{TOO_LONG} (error)"
    if count := report.dropped.get(reason, 0):
        raise DataError(
            f"{count} of {report.rows} rows are longer than `data.max_length` ({max_length} tokens): "
            + _listed(report, reason),
            fix="raise `data.max_length`, or set `data.overlength` to drop, truncate_left, truncate_right or split",
        )


def _refuse_unsupervised(report: Report, most: float) -> None:
    count = report.dropped.get(UNSUPERVISED, 0)
    if count > most * report.rows:
        raise DataError(
            f"{count} of {report.rows} rows have no supervised token: {_listed(report, UNSUPERVISED)}",
            expected=f"at most {most:.0%} of the rows (`data.max_unsupervised`)",
            fix="mend the rows or the template, raise `data.max_length`, or set `data.max_unsupervised`",
        )


def counted(dataset: Dataset, report: Report, max_length: int | None = None) -> Dataset:
    """`dataset`, with its samples, tokens and labels added to `report`; how full it is, if packed to `max_length`."""
    table: Any
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for labels in table["labels"].chunks:
            values = labels.flatten().to_numpy()
            report.tokens += len(values)
            report.supervised_tokens += int((values != IGNORED).sum())
    report.samples += len(dataset)
    if max_length is not None and len(dataset):
        report.fullness = report.tokens / (report.samples * max_length)
    return dataset
