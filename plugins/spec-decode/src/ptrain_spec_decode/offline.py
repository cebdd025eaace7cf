"""Offline generation: prompts to an engine, its answers to a journal, and from there to a data set."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptrain import DataError
from ptrain.seeds import derived_seed
from ptrain_spec_decode.engines import Engine, Request, Settings
from ptrain_spec_decode.journal import Journal

JSON_BYTES, PARQUET_BYTES = 7, 4
"""For a token: of a large vocabulary with a comma, and of 32 bits."""
LINE_BYTES = 128
SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Outcome:
    """What a call has come to.

    Attributes:
        rows: in the data set.
        failed: the reasons for those that are missing, by key.
        left: requests that were not sent, because the budget was spent.
        used: tokens that were read and written in this call.
    """

    rows: int
    failed: dict[str, str]
    left: int
    used: int


def requests_of(prompts: Sequence[list[int]], seed: int) -> list[Request]:
    """A request for each prompt; its key says which one it is and what stands in it."""
    found = []
    for number, prompt in enumerate(prompts):
        digest = hashlib.blake2b(json.dumps(prompt).encode(), digest_size=6).hexdigest()
        key = f"{number}-{digest}"
        found.append(Request(key, prompt, derived_seed(seed, key) % 2**31))
    return found


def journal_settings(engine: str, settings: Settings, requests: Sequence[Request]) -> dict[str, Any]:
    """What must be the same for answers to belong together."""
    digest = hashlib.blake2b(" ".join(request.key for request in requests).encode(), digest_size=12).hexdigest()
    names = ("model", "new_tokens", "temperature", "top_k", "top_p", "seed")
    return {"engine": engine, **{name: getattr(settings, name) for name in names}, "prompts": digest}


def bytes_needed(rows: int, left: int, new_tokens: int, output: Path) -> int:
    """What the journal still grows by, and what the data set takes beside it."""
    own = 2 * PARQUET_BYTES if output.suffix == ".parquet" else 2 * JSON_BYTES
    return left * (LINE_BYTES + JSON_BYTES * new_tokens) + rows * (LINE_BYTES + own * new_tokens)


def check_space(output: Path, needed: int) -> None:
    """Raise DataError where the disk of `output` has less than that."""
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise DataError(
            f"the data set and its journal will take about {size(needed)}, and `{output.parent}` has {size(free)} left",
            fix="lower --count or --new-tokens, or write to another disk",
        )


def size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def collect(
    engine: Engine,
    requests: Sequence[Request],
    journal: Journal,
    budget: int | None = None,
    told: Callable[[int], None] = lambda used: None,
) -> int:
    """Ask for every answer that the journal lacks, and write each down at once; return the requests not sent.

    Args:
        budget: once so many tokens were read and written in this call, nothing more is sent.
        told: called after each answer with the tokens that it took.
    """
    missing = [request for request in requests if request.key not in journal]
    spent, sent = 0, 0

    def affordable() -> Iterator[Request]:
        nonlocal sent
        for request in missing:
            if budget is not None and spent >= budget:
                return
            sent += 1
            yield request

    for answer in engine.answers(affordable()) if missing else ():
        journal.add(answer)
        spent += answer.used
        told(answer.used)
    return len(missing) - sent


def write_rows(journal: Journal, requests: Sequence[Request], output: Path) -> int:
    """Write the answers in the order of their prompts, as rows with `input_ids` and `labels`; return how many.

    The file is there with all of them, or as it was before.
    """
    keys = [request.key for request in requests if request.key in journal]
    temporary = output.with_name(output.name + ".tmp")
    write = _write_parquet if output.suffix == ".parquet" else _write_json
    write((journal.tokens(key) for key in keys), temporary)
    temporary.replace(output)
    return len(keys)


def _write_json(rows: Iterator[list[int]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for tokens in rows:
            ids = json.dumps(tokens, separators=(",", ":"))
            file.write(f'{{"input_ids":{ids},"labels":{ids}}}\n')


def _write_parquet(rows: Iterator[list[int]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ints = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", ints), ("labels", ints)])
    with pq.ParquetWriter(path, schema) as writer:
        while block := [tokens for tokens, _ in zip(rows, range(1000), strict=False)]:
            column = pa.array(block, type=ints)
            writer.write_table(pa.table([column, column], schema=schema))


class Meter:
    """Says how far a generation is: a bar on a terminal, else a line now and then."""

    EVERY = 30.0
    """Seconds between lines."""

    def __init__(self, total: int, say: Callable[[str], None], bar: Callable[[int], None] | None) -> None:
        self._total, self._say, self._bar = total, say, bar
        self._began = self._told = time.monotonic()
        self._done = self._used = 0

    def __call__(self, used: int) -> None:
        """Called with the tokens of each answer."""
        self._done, self._used = self._done + 1, self._used + used
        now = time.monotonic()
        if self._bar is not None:
            self._bar(1)
        elif now - self._told >= self.EVERY:
            self._told = now
            self._say(self.line(now - self._began))

    def line(self, seconds: float) -> str:
        """So many of all, how fast, and how long it will still take."""
        left = (self._total - self._done) * seconds / max(self._done, 1)
        rate = self._used / max(seconds, 1e-9)
        return f"{self._done:,} of {self._total:,} rows, {rate:,.0f} tokens/s, {span(left)} left"


def span(seconds: float) -> str:
    """A time for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"
