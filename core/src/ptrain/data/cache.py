"""Prepared data, cached by content: prepared once, before any process group exists, then memory-mapped.

The key holds everything that changes the result (rows, tokenizer, template, processing, code versions) and
nothing else, so that neither a stale result is used nor a good one made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.data.report import Report
from ptrain.data.workspace import Workspace, using
from ptrain.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ptrain.run import Run

FORMAT = 1
"""Part of every key: raise it when the same input gives another result."""
NOT_IN_KEY = {
    "sources", "eval_sources", "num_proc", "dl_num_workers", "cache_dir", "fail_on_missing_cache", "div_length",
    "pad_to",
}  # fmt: skip
"""Keys of the `data` section that do not change what is prepared (the sources are added one by one)."""


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

    def lines(self) -> list[str]:
        """The counts, for people."""
        return [f"{split}: {line}" for split, report in self.report.items() for line in Report.of(report).lines()]


def prepare(run: Run) -> Prepared:
    """The prepared data of a run, from the cache or made now; sets `run.tokenizer`.

    Raises:
        DataError: a source, a row or the template is wrong; there are no rows; or it is not in the cache and
            `data.fail_on_missing_cache` is on.
    """
    root = run.recipe.data.cache_dir.expanduser()
    path = root / key(run)
    with _lock(root, path.name):
        if not (path / "report.json").exists():
            if run.recipe.data.fail_on_missing_cache:
                raise DataError(
                    f"the prepared data is not in the cache `{root}`",
                    fix="run `ptrain prepare` first, or set `data.fail_on_missing_cache: false`",
                )
            _make(run, path)
            hit = False
        else:
            hit = True
    found = open_prepared(path)
    run.tokenizer = found.tokenizer()
    return Prepared(found.path, found.train, found.eval, found.report, hit)


def open_prepared(path: Path) -> Prepared:
    """The prepared data in a folder of the cache."""
    report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    return Prepared(path, _rows(path / "train"), _rows(path / "eval"), report)


def _rows(folder: Path) -> Dataset:
    from datasets import Dataset

    return Dataset.load_from_disk(str(folder)) if folder.exists() else Dataset.from_dict({})


def key(run: Run) -> str:
    """The name of the prepared data in the cache."""
    data = run.recipe.data
    parts = run.parts
    sources = [
        [source.config.model_dump(mode="json"), source.fingerprint()] for source in [*parts.sources, *parts.eval_sources]
    ]
    content = {
        "format": FORMAT,
        "type": run.recipe.type,
        "data": data.model_dump(mode="json", exclude=NOT_IN_KEY),
        "sources": sources,
        "training_sources": len(parts.sources),
        "tokenizer": _tokenizer_key(run),
        "layers": run.layer_versions(),
        "user_code": run.loaded.user_code.sha256 if run.loaded.user_code else None,
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _tokenizer_key(run: Run) -> Any:
    """What the tokenizer is: its section if it is made from the rows, its content otherwise."""
    from ptrain.data.tokenizers import TrainedTokenizer, template_text

    part = run.parts.tokenizer
    template = part.config.chat_template
    section = [part.config.model_dump(mode="json"), template_text(template) if template else None]
    if isinstance(part, TrainedTokenizer):
        return section
    run.tokenizer = run.call("create_tokenizer")
    raw = getattr(run.tokenizer, "backend_tokenizer", None)
    text = raw.to_str() if raw is not None else json.dumps(run.tokenizer.get_vocab(), sort_keys=True)
    return [section, hashlib.sha256(text.encode()).hexdigest(), run.tokenizer.chat_template, run.tokenizer.special_tokens_map]


def _make(run: Run, path: Path) -> None:
    from datasets import disable_progress_bars

    staged = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    scratch = staged / "scratch"
    scratch.mkdir(parents=True)
    disable_progress_bars()
    try:
        with using(Workspace(scratch, num_proc=run.recipe.data.num_proc)) as space:
            for split, rows in _splits(run).items():
                if len(rows):
                    rows.save_to_disk(str(staged / split))
            report = {split: found.json() for split, found in space.reports.items()}
        run.tokenizer.save_pretrained(staged / "tokenizer")
        shutil.rmtree(scratch)
        (staged / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        staged.rename(path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _splits(run: Run) -> dict[str, Dataset]:
    """Token rows of both splits."""
    from datasets import Dataset

    rows = _loaded(run, run.parts.sources)
    run.raw_rows = rows
    if not hasattr(run, "tokenizer"):
        run.tokenizer = run.call("create_tokenizer")
    parts = dict(run.call("split", dataset=rows))
    if run.parts.eval_sources:
        parts["eval"] = _joined([part for part in (parts["eval"], _loaded(run, run.parts.eval_sources)) if len(part)])
    found = {}
    for split in ("train", "eval"):
        empty = not len(parts[split])
        if empty and (split == "train" or _wants_evaluation(run)):
            raise DataError(f"there are no rows for {'training' if split == 'train' else 'evaluation'}")
        found[split] = Dataset.from_dict({}) if empty else run.call("process", split=split, dataset=parts[split])
        if not empty and not len(found[split]):
            raise DataError(
                f"the {split} rows give no sample of `data.max_length` ({run.recipe.data.max_length} tokens)",
                fix="lower `data.max_length`, or add data",
            )
    return found


def _wants_evaluation(run: Run) -> bool:
    return bool(run.parts.eval_sources) or run.recipe.data.train_eval_split[1] > 0


def _loaded(run: Run, sources: list[Any]) -> Dataset:
    return _joined([run.call("load", source=source) for source in sources])


def _joined(parts: list[Any]) -> Dataset:
    """Rows one after another.

    Raises:
        DataError: their columns do not fit together.
    """
    from datasets import concatenate_datasets

    common = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    try:
        return parts[0] if len(parts) == 1 else concatenate_datasets([part.select_columns(common) for part in parts])
    except ValueError as error:
        raise DataError(f"the rows of the sources do not fit together: {error}") from error


@contextmanager
def _lock(root: Path, name: str) -> Iterator[None]:
    """One preparation of this data at a time, on this machine or a shared disk."""
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
