"""Encoding in shards of fixed size: the result does not depend on how many processes do it, or on a restart.

A finished shard is a file named after its content and its job. A preparation that was killed finds its shards again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.data.arrow import mapped, write_batches, write_dataset
from ptrain.data.documents import Documents, document_batch, token_schema
from ptrain.data.process import Job, Work
from ptrain.data.progress import progress
from ptrain.data.report import Report
from ptrain.data.rows import ORIGIN, TOOLS
from ptrain.data.workspace import workspace

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROWS = 1000
"""Rows of a shard."""
START_SECONDS = 4.0
"""What it takes until processes are at work, since each of them imports transformers: they have to save more."""
REPORT = b"report"
READ = ("messages", TOOLS, "text", "input_ids", "labels", ORIGIN)
"""The columns that encoding reads."""


@dataclass
class Shards:
    """The shards of a data set: how each is made.

    Attributes:
        dataset: the rows.
        work: what to do with them.
        folder: where the files of finished shards are.
    """

    dataset: Dataset
    work: Work
    folder: Path

    def make(self, number: int) -> Path:
        """The file of shard `number`, made unless it is there."""
        first = number * ROWS
        table: Any = self.dataset.with_format("arrow")[first : first + ROWS]
        path = self.folder / f"{number:06d}-{_digest(table, self.work.job)}.arrow"
        if not path.exists():
            documents, report = self.work.documents(table, first)
            schema = token_schema().with_metadata({REPORT: json.dumps(report.json()).encode()})
            write_batches([document_batch(documents)] if documents else [], schema, path)
        return path


def _digest(table: pa.Table, job: Job) -> str:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    digest = hashlib.blake2b(memoryview(sink.getvalue()), digest_size=12)
    digest.update(json.dumps(job.json(), sort_keys=True).encode())
    return digest.hexdigest()


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, job: Job, report: Report) -> Documents:
    """The documents of a data set; what was counted is added to `report`.

    Raises:
        DataError: of the first shard that is wrong.
    """
    space = workspace()
    dataset = dataset.select_columns([name for name in READ if name in dataset.column_names])
    folder = space.folder / "shards"
    folder.mkdir(exist_ok=True)
    count = -(-len(dataset) // ROWS)
    files: list[Path] = []
    with progress("preparing", len(dataset)) as done:
        for file in _made(dataset, tokenizer, job, folder, count):
            files.append(file)
            report.add(Report.of(json.loads(mapped(file).schema.metadata[REPORT])))
            done(ROWS)
    return Documents(files)


def _made(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, job: Job, folder: Path, count: int) -> Iterator[Path]:
    """The files of all shards; the first are made here, the others by processes where that saves time."""
    processes = workspace().num_proc
    shards, began = Shards(dataset, Work(tokenizer, job), folder), time.perf_counter()
    for number in range(count):
        rest = (time.perf_counter() - began) / max(number, 1) * (count - number)
        if number and rest * (1 - 1 / processes) > START_SECONDS:
            yield from _in_processes(dataset, tokenizer, job, folder, range(number, count))
            return
        yield shards.make(number)


def _in_processes(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, job: Job, folder: Path, numbers: range
) -> Iterator[Path]:
    from ptrain.data.processes import in_processes

    space = workspace()
    rows = write_dataset(dataset, space.path("raw.arrow"))
    place = space.path("tokenizer")
    tokenizer.save_pretrained(place)
    task = {"rows": str(rows), "tokenizer": str(place), "folder": str(folder), "job": job.json()}
    yield from map(Path, in_processes(task, numbers, min(space.num_proc, len(numbers))))
