"""Everything that is wrong or odd in the data of a recipe, counted: a run stops at the first of these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ptrain.data.encode import IGNORED
from ptrain.data.process import UNSUPERVISED, Job, Overlength, Work
from ptrain.data.reading import row_names
from ptrain.data.render import Unrenderable
from ptrain.data.report import NAMED
from ptrain.data.workspace import Workspace, using
from ptrain.errors import DataError, PtrainError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from ptrain.data.encode import Tokens
    from ptrain.parts import Source
    from ptrain.run import Run

BLOCK = 1000
SHARES = (50, 90, 99, 100)
"""Percentiles of the lengths that are given; 100 is the longest."""


@dataclass
class Found:
    """How many rows have something, and the names of some of them."""

    count: int = 0
    rows: list[str] = field(default_factory=list)

    def add(self, name: str, count: int = 1) -> None:
        """Count a row (or several)."""
        self.count += count
        if len(self.rows) < NAMED:
            self.rows.append(name)


@dataclass
class Audit:
    """What one source holds.

    Attributes:
        source: its type, and its path or name.
        rows: that could be read.
        broken: rows that can't be read or are no conversation; a run stops there.
        unrenderable: rows that the chat template refuses; a run stops there.
        unsupervised: rows without a token to learn, or with none left once they are truncated.
        overlong: rows longer than `data.max_length`, where that matters.
        several_bos: rows with more than one BOS token.
        duplicates: rows with the same tokens as an earlier one, in any source of the split.
        empty_turns: rows in which an assistant turn says nothing and calls nothing.
        turns, unended_turns: assistant turns, and those of them without an end-of-turn token to learn.
        tokens, supervised_tokens: of the rows that could be rendered and have a token to learn.
        lengths: in tokens, by percentile.
        stopped: why the source can't be read at all.
    """

    source: str
    rows: int = 0
    broken: Found = field(default_factory=Found)
    unrenderable: Found = field(default_factory=Found)
    unsupervised: Found = field(default_factory=Found)
    overlong: Found = field(default_factory=Found)
    several_bos: Found = field(default_factory=Found)
    duplicates: Found = field(default_factory=Found)
    empty_turns: Found = field(default_factory=Found)
    turns: int = 0
    unended_turns: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None


def audit(run: Run) -> dict[str, list[Audit]]:
    """What each source of `sources` and `eval_sources` holds, by split; nothing is dropped, and nothing stops it.

    Raises:
        PtrainError: the tokenizer can't be made.
    """
    splits = {"train": run.parts.sources, "eval": run.parts.eval_sources}
    with TemporaryDirectory(prefix="ptrain-audit-") as folder, using(Workspace(Path(folder))) as space:
        read = {split: [_read(run, source, space) for source in sources] for split, sources in splits.items()}
        found = {split: [made for _, made in parts] for split, parts in read.items()}
        if not _make_tokenizer(run, [rows for rows, _ in read["train"] if rows is not None]):
            return found
        for parts in read.values():
            seen: dict[bytes, str] = {}
            for rows, made in parts:
                _judge(run, rows, made, seen)
        return found


def stops(run: Run, found: dict[str, list[Audit]]) -> list[str]:
    """Why `ptrain run` would stop on this data, if it would."""
    data: Any = run.recipe.data
    policy, reasons = _policy(run), []
    for split, audits in found.items():
        for one in audits:
            here = f"{split}: {one.source}: "
            reasons += [here + one.stopped] if one.stopped else []
            wrong = {kind: getattr(one, kind).count for kind in ("broken", "unrenderable")}
            reasons += [f"{here}{count} rows {kind}" for kind, count in wrong.items() if count]
            if one.overlong.count and policy == "error":
                reasons.append(f"{here}{one.overlong.count} rows longer than data.max_length")
        rows = sum(one.rows for one in audits)
        empty = sum(one.unsupervised.count for one in audits)
        if hasattr(data, "max_unsupervised") and empty > data.max_unsupervised * rows:
            reasons.append(f"{split}: {empty} of {rows} rows without a supervised token")
    return reasons


def _policy(run: Run) -> Overlength | None:
    """What becomes of rows that are too long; None for trainers that cut every text into samples."""
    data: Any = run.recipe.data
    if not hasattr(data, "overlength"):
        return None
    return data.overlength or ("drop" if data.filter_samples else "error")


def _read(run: Run, source: Source, space: Workspace) -> tuple[Dataset | None, Audit]:
    from ptrain.data.load import canonical

    config: Any = source.config
    place = getattr(config, "path", None) or getattr(config, "name_or_path", None)
    made = Audit(f"{config.type} {place}" if place else config.type)
    space.broken = []
    rows = None
    try:
        rows = canonical(run.call("load", source=source), config.type)
        made.rows = len(rows)
    except PtrainError as error:
        made.stopped = str(error)
    for error in space.broken:
        where = error.problems[0].where
        made.broken.add(f"{where}: {error.problems[0].message}" if where else error.problems[0].message)
    space.broken = None
    return rows, made


def _make_tokenizer(run: Run, rows: Sequence[Dataset]) -> bool:
    """Make the tokenizer; False where it is trained on rows, and there are none."""
    from ptrain.data.load import joined

    if rows:
        run.raw_rows = joined(list(rows))
    elif run.recipe.tokenizer.type.rpartition(":")[2] == "train":
        return False
    run.tokenizer = run.call("create_tokenizer")
    return True


def _judge(run: Run, rows: Dataset | None, made: Audit, seen: dict[bytes, str]) -> None:
    work = None if rows is None else _work(run, rows)
    if rows is None or work is None:
        return
    lengths: list[int] = []
    for first in range(0, len(rows), BLOCK):
        table: Any = rows.with_format("arrow")[first : first + BLOCK]
        _note_empty_turns(table, first, made)
        for name, tokens in _documents(work, table, first, made):
            lengths.append(len(tokens.ids))
            _note(run, name, tokens, made, seen)
    if lengths:
        import numpy as np

        made.lengths = {
            f"p{share}" if share < 100 else "longest": int(np.percentile(lengths, share, method="higher"))
            for share in SHARES
        }


def _work(run: Run, rows: Dataset) -> Work | None:
    """How the rows become tokens; None for rows that only their trainer understands."""
    columns, data = set(rows.column_names), run.recipe.data
    if {"messages", "input_ids"} & columns:
        mask, think = getattr(data, "mask_inputs", True), getattr(data, "ignore_empty_think", False)
        return Work(run.tokenizer, Job("conversations", mask_inputs=mask, ignore_empty_think=think))
    return Work(run.tokenizer, Job("texts")) if "text" in columns else None


def _documents(work: Work, table: pa.Table, first: int, made: Audit) -> Iterator[tuple[str, Tokens]]:
    """Each row's document with the row's name; a block in which one fails is done again row by row."""
    names = row_names(table, first)
    try:
        documents, report = work.documents(table, first)
        unlearnt = report.dropped.get(UNSUPERVISED, 0)
        if not unlearnt:
            made.turns += report.turns
            made.unended_turns += report.unended_turns
            yield from zip(names, documents, strict=True)
            return
    except DataError:
        pass
    for at, name in enumerate(names):
        try:
            documents, report = work.documents(table.slice(at, 1), first + at)
        except DataError as error:
            kind = made.unrenderable if isinstance(error.__cause__, Unrenderable) else made.broken
            kind.add(error.problems[0].message)
            continue
        made.turns += report.turns
        made.unended_turns += report.unended_turns
        if not documents:
            made.unsupervised.add(name)
        yield from ((name, document) for document in documents)


def _note(run: Run, name: str, tokens: Tokens, made: Audit, seen: dict[bytes, str]) -> None:
    made.tokens += len(tokens.ids)
    made.supervised_tokens += int((tokens.labels != IGNORED).sum())
    policy, size = _policy(run), run.recipe.data.max_length
    if policy is not None and len(tokens.ids) > size:
        made.overlong.add(name)
        if policy.startswith("truncate") and not _left(tokens, size, policy):
            made.unsupervised.add(name)
    bos = run.tokenizer.bos_token_id
    if bos is not None and int((tokens.ids == bos).sum()) > 1:
        made.several_bos.add(name)
    digest = hashlib.blake2b(tokens.ids.tobytes(), digest_size=16).digest()
    # The row itself comes again where its source has a weight of more than 1.
    if seen.setdefault(digest, name) != name:
        made.duplicates.add(name)


def _left(tokens: Tokens, size: int, policy: str) -> bool:
    """Whether a token to learn is left of a row that is truncated."""
    labels = tokens.labels[1:size] if policy == "truncate_right" else tokens.labels[1:][-(size - 1) :]
    return bool((labels != IGNORED).any())


def _note_empty_turns(table: pa.Table, first: int, made: Audit) -> None:
    if "messages" not in table.column_names:
        return
    for messages, name in zip(table["messages"].to_pylist(), row_names(table, first), strict=True):
        turns = [one for one in messages or () if one["role"] == "assistant"]
        if any(not (one.get("content") or "").strip() and not one.get("tool_calls") for one in turns):
            made.empty_turns.add(name)
