"""`token-batches`: batches that were tokenised and put together elsewhere, on this disk or in object storage.

A batch is a folder of three Parquet files: `queries` (`BATCH_QUERY_ID`, `QUERY_TOKEN_ID_LIST`), `documents`
(`BATCH_DOCUMENT_ID`, `DOCUMENT_TOKEN_ID_LIST`) and `relations` (`BATCH_QUERY_ID`, `BATCH_DOCUMENT_ID`, `RELEVANCE`: 1,
0 or -1; `SCORE`, where a teacher gave some). Every query becomes a row with all documents that have a relation to it,
so that no label is lost however rows are dealt out to workers; a document without any goes to some query, unlabelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ptrain
from ptrain import DataError, PtrainError
from ptrain_embed.rows import NEGATIVE, POSITIVE, UNLABELLED, content_key, schema, set_number

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    from ptrain import Run

QUERY, DOCUMENT, RELEVANCE, SCORE = "BATCH_QUERY_ID", "BATCH_DOCUMENT_ID", "RELEVANCE", "SCORE"
TOKENS = {"queries": "QUERY_TOKEN_ID_LIST", "documents": "DOCUMENT_TOKEN_ID_LIST"}
IDS = {"queries": QUERY, "documents": DOCUMENT}
FILES = ("queries", "documents", "relations")
VERSION = ("name", "size", "ETag", "etag", "md5Hash", "crc32c", "LastModified", "last_modified", "mtime", "created")
"""What file systems say of a file that changes with its content."""
Partners = list[list[tuple[int, int, float | None]]]
"""Of each query: document, relation and score of its partners."""


@dataclass(frozen=True)
class Stored:
    """One stored batch.

    Attributes:
        queries, documents: the tokens of each, or its place where they are left in the files.
        names: the ids of queries.
        partners: by query, `(document, relation, score)` of each.
    """

    queries: list[np.ndarray]
    documents: list[np.ndarray]
    names: list[Any]
    partners: Partners


class TokenBatches(ptrain.Source):
    """`token-batches`: batches of tokens, as they were put together or (`batch_from: mixed`) mixed anew."""

    class Config(ptrain.SourceConfig):
        """Keys of `token-batches`."""

        not_prepared: ClassVar[frozenset[str]] = frozenset({"path", "storage_options"})

        path: str
        """The folder of the batches: a path, or a URL that fsspec opens (`s3://bucket/batches`)."""
        storage_options: dict[str, Any] = {}
        """Arguments for the file system of the URL, such as `endpoint_url` or keys (`${env:...}`)."""
        stream: bool = False
        """Read tokens when a step needs them, instead of copying all batches to the cache first; with
        `data.batch_from: one_source`, by which a step has rows of one stored batch."""

    def load(self, run: Run, split: str) -> Dataset:
        """The rows of every batch; where they are streamed, positions in the files stand for tokens.

        Raises:
            DataError: there are no batches, or one is broken or has a relation to what it does not have.
        """
        from ptrain.data.arrow import open_arrow, write_batches
        from ptrain.data.workspace import workspace

        number, sources = set_number(run, self), len(run.parts.sources) + len(run.parts.eval_sources)
        made = (self._rows(stored, at, number + sources * (at + 1)) for at, stored in enumerate(self._all()))
        return open_arrow(write_batches(made, schema(), workspace().path(f"batches-{number}.arrow")))

    def fingerprint(self) -> Any:
        """What is stored, by the name, size and version (or, on this disk, the hash) of each file."""
        from fsspec.implementations.local import LocalFileSystem

        from ptrain.data.sources.base import content_hashes

        if isinstance(self._system, LocalFileSystem):
            files = [Path(batch, f"{name}.parquet") for batch in self.batches for name in FILES]
            found: Any = content_hashes(path for path in files if path.is_file())
        else:
            with self._explained():
                infos = [self._system.info(f"{batch}/{name}.parquet") for batch in self.batches for name in FILES]
            found = [{key: str(info[key]) for key in VERSION if key in info} for info in infos]
        return [found, self.config.path if self.config.stream else None]

    @cached_property
    def _version(self) -> int:
        """A hash of what is stored, in the keys of streamed rows: so no run is resumed with other tokens."""
        return content_key(json.dumps(self.fingerprint(), sort_keys=True).encode())

    @cached_property
    def batches(self) -> list[str]:
        """The folders of the batches, by name.

        Raises:
            DataError: there are none.
        """
        with self._explained():
            entries = self._system.ls(self._root, detail=True)
        names = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
        found = sorted(name for name in names if name.rpartition("/")[2][:1] not in "._")
        if not found:
            raise DataError(
                f"`{self.config.path}` holds no batches",
                expected="folders with `queries.parquet`, `documents.parquet` and `relations.parquet`",
            )
        return found

    def read(self, batch: str, *, tokens: bool = True) -> Stored:
        """One stored batch, with its tokens or without.

        Raises:
            DataError: a file is missing or broken, an id comes twice, or a relation is none or names what is not there.
        """
        tables = {name: self._table(batch, name, [IDS[name], *([TOKENS[name]] if tokens else [])]) for name in IDS}
        queries, documents = (_places(table[IDS[name]].to_pylist(), batch, name) for name, table in tables.items())
        partners = _partners(self._table(batch, "relations", [QUERY, DOCUMENT, RELEVANCE]), queries, documents, batch)
        lists = [_arrays(table[TOKENS[name]]) if tokens else _numbers(len(table)) for name, table in tables.items()]
        return Stored(lists[0], lists[1], list(queries), partners)

    def _all(self) -> Iterator[Stored]:
        """Every batch, the next one read while one is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="token-batches") as pool:
            futures = []
            for batch in self.batches:
                futures.append(pool.submit(self.read, batch, tokens=not self.config.stream))
                if len(futures) > 1:
                    yield futures.pop(0).result()
            yield futures.pop().result()

    def _rows(self, stored: Stored, at: int, number: int) -> pa.RecordBatch:
        import pyarrow as pa

        rows = []
        for query, partners in enumerate(stored.partners):
            tokens = [stored.queries[query], *(stored.documents[one] for one, _, _ in partners)]
            keys = [f"{number} query {query}", *(f"{number} {one}" for one, _, _ in partners)]
            hashed = [
                content_key(f"{self._version} {key}".encode() if self.config.stream else ids.tobytes())
                for key, ids in zip(keys, tokens, strict=True)
            ]
            scores = [score for _, _, score in partners if score is not None]
            rows.append({
                "tokens": tokens, "relations": [relation for _, relation, _ in partners],
                "scores": scores if len(scores) == len(partners) else [], "alike": False,
                "query_key": hashed[0], "document_keys": hashed[1:], "set": number,
                "origin": f"{self.batches[at]}: query {stored.names[query]}",
            })  # fmt: skip
        return pa.RecordBatch.from_pylist(rows, schema())

    def _table(self, batch: str, name: str, columns: list[str]) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = f"{batch}/{name}.parquet"
        try:
            with self._explained(), self._system.open(path, "rb") as file:
                content = pq.ParquetFile(file if file.seekable() else pa.BufferReader(file.read()))
                there = {column.upper(): column for column in content.schema_arrow.names}
                if missing := [column for column in columns if column not in there]:
                    raise DataError(f"`{path}` has no column `{missing[0]}`", expected=", ".join(columns))
                kept = [*columns, *([SCORE] if name == "relations" and SCORE in there else [])]
                return content.read(columns=[there[column] for column in kept]).rename_columns(kept)
        except pa.ArrowException as error:
            raise DataError(
                f"`{path}` can't be read as Parquet: {error}", fix="see whether the file is whole"
            ) from error

    @property
    def _root(self) -> str:
        return self._opened[1]

    @property
    def _system(self) -> Any:
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, and the path in it."""
        from fsspec.core import url_to_fs

        path, split = self.config.path, self.config.split
        with self._explained():
            return url_to_fs(f"{path.rstrip('/')}/{split}" if split else path, **self.config.storage_options)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Within it, what a file system fails with is told in ptrain's words."""
        import pyarrow as pa

        try:
            yield
        except (PtrainError, pa.ArrowException):
            raise
        except ImportError as error:
            raise DataError(f"`{self.config.path}` needs a package that is missing: {error}") from error
        except FileNotFoundError as error:
            found = str(error.filename or error.args[-1])
            raise DataError(f"`{self.config.path}`: not found: {found}", expected="a folder of batches") from error
        except Exception as error:  # every file system has errors of its own
            raise DataError(f"`{self.config.path}` can't be read: {error}", fix="see `storage_options`") from error


def _places(names: list[Any], batch: str, what: str) -> dict[Any, int]:
    """The place of each id.

    Raises:
        DataError: there are none, or one comes twice.
    """
    found = {name: at for at, name in enumerate(names)}
    if not names:
        raise DataError(f"`{batch}` has no {what}", expected="at least one")
    if len(found) < len(names):
        twice = next(name for at, name in enumerate(names) if found[name] != at)
        raise DataError(f"`{batch}/{what}.parquet`: the id `{twice}` comes a second time", expected="each id once")
    return found


def _partners(table: pa.Table, queries: Mapping[Any, int], documents: Mapping[Any, int], batch: str) -> Partners:
    partners: list[dict[int, tuple[int, float | None]]] = [{} for _ in queries]
    columns = {name: table[name].to_pylist() for name in table.column_names}
    scores = columns.get(SCORE, [None] * len(table))
    for query, document, relation, score in zip(
        columns[QUERY], columns[DOCUMENT], columns[RELEVANCE], scores, strict=True
    ):
        for what, name, known in (("queries", query, queries), ("documents", document, documents)):
            if name not in known:
                raise DataError(
                    f"`{batch}/relations.parquet` names the id `{name}`, which is not in `{what}.parquet`",
                    expected="relations between queries and documents of the batch",
                )
        if relation not in (POSITIVE, UNLABELLED, NEGATIVE):
            raise DataError(f"`{batch}/relations.parquet`: `{RELEVANCE}` is {relation!r}", expected="1, 0 or -1")
        own = partners[queries[query]]
        if own.setdefault(documents[document], (int(relation), score))[0] != relation:
            raise DataError(
                f"`{batch}/relations.parquet` has two relations of the query `{query}` to the document `{document}`",
                expected="one for each pair",
            )
    related = {document for own in partners for document in own}
    for document, own in zip((one for one in range(len(documents)) if one not in related), cycle(partners)):
        own[document] = (UNLABELLED, None)
    return [[(document, *found) for document, found in own.items()] for own in partners]


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    import numpy as np

    return [one.values.to_numpy(zero_copy_only=False).astype(np.int32) for chunk in column.chunks for one in chunk]


def _numbers(count: int) -> list[np.ndarray]:
    import numpy as np

    return [np.array([at], dtype=np.int32) for at in range(count)]
