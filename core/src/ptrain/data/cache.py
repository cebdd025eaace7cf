"""Prepared data, cached by content: prepared once, before any process group exists, then memory-mapped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ptrain.data.arrow import open_arrow, write_dataset
from ptrain.data.key import key
from ptrain.data.load import load_rows
from ptrain.data.report import Report
from ptrain.data.sources.base import content_hashes
from ptrain.data.workspace import Workspace, using
from ptrain.errors import DataError, MissingData
from ptrain.recipe.env import value_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ptrain.run import Run

REPORT, DIGEST = "report.json", "train.sha256"


@dataclass(frozen=True)
class Prepared:
    """Prepared data on disk.

    Attributes:
        path: its folder in the cache.
        train, eval: token rows, memory-mapped; without rows, an empty Dataset.
        report: the counts of each split.
        hit: whether it was in the cache already.
    """

    path: Path
    train: Dataset
    eval: Dataset
    report: dict[str, Any]
    hit: bool = True

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the data was prepared with."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path / "tokenizer")

    def digest(self) -> str:
        """SHA-256 of the training rows: the same tokens in the same order, however they came about."""
        return (self.path / DIGEST).read_text(encoding="utf-8")

    def lines(self) -> list[str]:
        """The counts, for people."""
        return [f"{split}: {line}" for split, report in self.report.items() for line in Report.of(report).lines()]


def prepare(run: Run) -> Prepared:
    """The prepared data of a run, from the cache or made now; sets `run.tokenizer`.

    A preparation that was killed is gone on with: what it had encoded is used.

    Raises:
        DataError: a source, a row or the template is wrong; there are no rows; or it is not in the cache and
            `data.fail_on_missing_cache` is on.
    """
    root: Path = value_of(run.recipe.data.cache_dir, "data.cache_dir")
    path = root / key(run)
    hit = (path / REPORT).exists()
    if not hit:
        if run.recipe.data.fail_on_missing_cache:
            raise MissingData(
                f"the prepared data is not in the cache `{root}`",
                fix="run `ptrain prepare` first, or set `data.fail_on_missing_cache: false`",
            )
        with _lock(root, path.name):
            # Another process may have made it while this one waited.
            hit = (path / REPORT).exists()
            if not hit:
                _make(run, path)
    found = open_prepared(path)
    run.tokenizer = found.tokenizer()
    return Prepared(found.path, found.train, found.eval, found.report, hit)


def open_prepared(path: Path) -> Prepared:
    """The prepared data in a folder of the cache."""
    report = json.loads((path / REPORT).read_text(encoding="utf-8"))
    return Prepared(path, _rows(path / "train.arrow"), _rows(path / "eval.arrow"), report)


def _rows(file: Path) -> Dataset:
    from datasets import Dataset

    return open_arrow(file) if file.exists() else Dataset.from_dict({})


def _make(run: Run, path: Path) -> None:
    """Prepare into a folder beside `path`, then rename it. What was encoded is left there only if this is killed."""
    staged = path.with_name(f"{path.name}.tmp")
    scratch = staged / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with using(Workspace(scratch, num_proc=run.recipe.data.num_proc)) as space:
            for split, rows in _splits(run).items():
                if len(rows):
                    write_dataset(rows, staged / f"{split}.arrow")
            report = {split: found.json() for split, found in space.reports.items()}
        run.tokenizer.save_pretrained(staged / "tokenizer")
        ((_, _, digest),) = content_hashes([staged / "train.arrow"])
        (staged / DIGEST).write_text(digest, encoding="utf-8")
        (staged / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
        shutil.rmtree(scratch)
        staged.rename(path)
    except Exception:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _splits(run: Run) -> dict[str, Dataset]:
    """Token rows of both splits."""
    run.raw_rows = load_rows(run, run.parts.sources)
    if not hasattr(run, "tokenizer"):
        run.tokenizer = run.call("create_tokenizer")
    parts = dict(run.call("split", dataset=run.raw_rows))
    if run.parts.eval_sources:
        parts["eval"] = load_rows(run, run.parts.eval_sources, besides=parts["eval"])
    return {split: _processed(run, split, parts[split]) for split in ("train", "eval")}


def _processed(run: Run, split: str, rows: Dataset) -> Dataset:
    if not len(rows):
        if split == "train" or run.parts.eval_sources or run.recipe.data.train_eval_split[1] > 0:
            raise DataError(
                f"there are no rows for {'training' if split == 'train' else 'evaluation'}",
                fix="look at `data.sources`, `data.eval_sources` and `data.train_eval_split`",
            )
        return rows
    found = run.call("process", split=split, dataset=rows)
    if not len(found):
        raise DataError(
            f"the {len(rows)} rows for {'training' if split == 'train' else 'evaluation'} give no sample of "
            f"`data.max_length` ({run.recipe.data.max_length}) tokens",
            fix="lower `data.max_length`, or add data",
        )
    return found


@contextmanager
def _lock(root: Path, name: str) -> Iterator[None]:
    """One preparation of this data at a time, on this machine or a shared disk; a killed one lets go by itself."""
    import fcntl

    path = root / f"{name}.lock"
    while True:
        with _opened(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue  # the one that held it before has removed it, and another may hold a new one
            try:
                yield
            finally:
                path.unlink()
            return


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise DataError(
            f"the cache `{path.parent}` can't be written: {error.strerror}",
            fix="set `data.cache_dir` to a folder that you may write to",
        ) from None


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
