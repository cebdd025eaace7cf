"""Local files: `jsonl`, `json`, `csv`, `parquet`, `txt` and `arrow`, compressed or not, by path or glob."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ptrain.data.arrow import BLOCK
from ptrain.data.rows import shown
from ptrain.data.sources.base import checked, content_hashes, matching, stored
from ptrain.data.workspace import workspace
from ptrain.errors import DataError, MissingData, Position
from ptrain.parts import Source
from ptrain.recipe.sections import SourceConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain.run import Run

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = {*OPENERS, ".zst"}
LONGEST_FIELD = 2**31 - 1
"""Characters of a field of a CSV file; Python's own limit is that of a short document."""
NumberedRows = Iterator[tuple[int, Any]]


class LocalFiles(Source):
    """Rows of one or more files, in the order of their names."""

    format: ClassVar[str] = ""
    samples = True

    class Config(SourceConfig):
        """Keys of every source of local files."""

        not_prepared: ClassVar[frozenset[str]] = frozenset({"path"})

        path: str | list[str]
        """A file, a pattern such as `data/*.jsonl.gz`, or a list of them."""

    def load(self, run: Run, split: str) -> Dataset:
        """The checked rows of all files.

        Raises:
            DataError: no such file, it is empty or broken, or a row is wrong; names file, row and field.
        """
        return stored((row for path in self.files() for row in self.read(path)), self.config)

    def fingerprint(self) -> Any:
        """Name, size and hash of each file."""
        return content_hashes(self.files())

    def files(self) -> list[Path]:
        """The files that `path` names.

        Raises:
            DataError: there are none.
        """
        given = [self.config.path] if isinstance(self.config.path, str) else self.config.path
        found: list[Path] = []
        for pattern in given:
            matches = matching(pattern)
            if not matches:
                raise _no_file(pattern)
            found += matches
        return found

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """The checked rows of one file."""
        empty = True
        try:
            for row in checked(self.parse(path), str(path)):
                empty = False
                yield row
        except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error, csv.Error) as error:
            packed = f", packed as `{path.suffix}`" if path.suffix in PACKED else ""
            raise DataError(
                f"`{path}` can't be read as {self.format}{packed}: {error}",
                fix="see whether the file is whole, and is what its name says",
            ) from error
        if empty and not workspace().broken:
            raise DataError(f"`{path}` has no rows", expected="at least one")

    def parse(self, path: Path) -> NumberedRows:
        """`(line or row number, row)` of one file; a DataError in place of a row that can't be read."""
        raise NotImplementedError


def _no_file(pattern: str) -> DataError:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return DataError(f"`{pattern}` is a folder", expected="a file", fix=f"write `{pattern}/*` for all files in it")
    nearest = next((p for p in path.absolute().parents if p.exists()), Path())
    return MissingData(f"there is no file `{pattern}`", fix=f"the nearest folder that exists is `{nearest}`")


def text_of(path: Path) -> IO[str]:
    """The file opened as UTF-8 text, decompressed by its ending, without the byte order mark that spreadsheets write.

    Raises:
        DataError: it ends in `.zst`, and zstandard is not installed.
    """
    if path.suffix == ".zst":
        try:
            import zstandard  # pyright: ignore[reportMissingImports] - an extra
        except ImportError as error:
            raise DataError(f"`{path}` needs a package that is missing", fix="pip install zstandard") from error
        return zstandard.open(path, "rt", encoding="utf-8-sig")
    opener: Any = OPENERS.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8-sig")


class JsonLinesFiles(LocalFiles):
    """`jsonl`: one JSON object a line."""

    format = "JSON lines"

    class Config(LocalFiles.Config):
        """Keys of `jsonl`."""

    def parse(self, path: Path) -> NumberedRows:
        """Each line that is not blank; a DataError in place of one that is no JSON."""
        with text_of(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parsed(line, path, number)


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        whole = number == 1 and line.lstrip()[:1] in ("[", "{")
        return DataError(
            f"this line is no JSON: {error.msg}",
            where=Position(str(path), number, error.colno),
            expected="one JSON object a line",
            fix="for one list of objects write `type: json`" if whole else None,
        )
    if number == 1 and isinstance(row, list):
        return DataError(
            "this line is a list", where=Position(str(path), 1, 1), expected="one JSON object a line",
            fix="for one list of objects write `type: json`",
        )  # fmt: skip
    return row


class JsonFiles(LocalFiles):
    """`json`: a file that holds one list of objects."""

    format = "JSON"

    class Config(LocalFiles.Config):
        """Keys of `json`."""

    def parse(self, path: Path) -> NumberedRows:
        """Each object of the list, numbered from 1."""
        with text_of(path) as file:
            try:
                content = json.load(file)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"this is no JSON: {error.msg}",
                    where=Position(str(path), error.lineno, error.colno),
                    fix="for one object a line write `type: jsonl`",
                ) from error
        if not isinstance(content, list):
            raise DataError(f"`{path}` holds {shown(content)}", expected="a JSON list of objects")
        yield from enumerate(content, 1)


class CsvFiles(LocalFiles):
    """`csv`: a table with a header."""

    format = "CSV"

    class Config(LocalFiles.Config):
        """Keys of `csv`."""

        delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
        """What separates the columns: one character (a tab is `"\\t"`, in double quotes)."""

    def parse(self, path: Path) -> NumberedRows:
        """Each record, numbered by its line; a DataError in place of one with other columns."""
        csv.field_size_limit(LONGEST_FIELD)
        with text_of(path) as file:
            reader = csv.DictReader(file, delimiter=self.config.delimiter)
            for row in reader:
                uneven = None in row or None in row.values()
                yield reader.line_num, _uneven(path, reader) if uneven else row


def _uneven(path: Path, reader: csv.DictReader[str]) -> DataError:
    return DataError(
        "this record has another number of columns than the header",
        where=Position(str(path), reader.line_num, 1),
        expected=f"{len(reader.fieldnames or ())} columns",
    )


class TextFiles(LocalFiles):
    """`txt`: plain text; a whole file is one row, or each piece between separators."""

    format = "UTF-8 text"

    class Config(LocalFiles.Config):
        """Keys of `txt`."""

        separator: str | None = None
        """What separates rows, e.g. a blank line; by default a file is one row."""

    def parse(self, path: Path) -> NumberedRows:
        """Each piece that is not blank, numbered from 1."""
        with text_of(path) as file:
            text = file.read()
        separator = self.config.separator
        for number, piece in enumerate(text.split(separator) if separator else [text], 1):
            if piece.strip():
                yield number, {"text": piece}


class ParquetFiles(LocalFiles):
    """`parquet`: Parquet tables."""

    format = "Parquet"

    class Config(LocalFiles.Config):
        """Keys of `parquet`."""

    def parse(self, path: Path) -> NumberedRows:
        """Each record, numbered from 1."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            batches = pq.ParquetFile(path).iter_batches(BLOCK)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
        except pa.ArrowException as error:
            raise DataError(
                f"`{path}` can't be read as Parquet: {error}", fix="see whether the file is whole"
            ) from error


class ArrowFiles(LocalFiles):
    """`arrow`: Arrow tables, as a stream or a file."""

    format = "Arrow"

    class Config(LocalFiles.Config):
        """Keys of `arrow`."""

    def parse(self, path: Path) -> NumberedRows:
        """Each record, numbered from 1."""
        import pyarrow as pa

        with pa.memory_map(str(path)) as file:
            try:
                yield from enumerate((row for batch in _batches(file, path) for row in batch.to_pylist()), 1)
            except pa.ArrowException as error:
                raise DataError(
                    f"`{path}` can't be read as Arrow: {error}", fix="see whether the file is whole"
                ) from error


def _batches(file: Any, path: Path) -> Iterator[Any]:
    """The record batches of an Arrow file (which ends in a footer) or stream."""
    import pyarrow as pa

    with path.open("rb") as start:
        is_file = start.read(6) == b"ARROW1"
    if not is_file:
        yield from pa.ipc.open_stream(file)
        return
    reader = pa.ipc.open_file(file)
    yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
