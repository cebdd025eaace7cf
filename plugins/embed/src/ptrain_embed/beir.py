"""`beir`: a folder with a corpus, queries, and judgements (qrels) of which document answers which query.

`corpus.jsonl` and `queries.jsonl` have `_id`, `text` and, for documents, `title`; the judgements of a split are in
`qrels/<split>.tsv` with the columns `query-id`, `corpus-id` and `score`, or in one file `qrels.*` for all splits. Each
may be JSON lines, Parquet or TSV, packed or not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ptrain
from ptrain import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain import Run

IDS = ("_id", "id")
QUERY_IDS = ("query-id", "query_id", "qid")
DOCUMENT_IDS = ("corpus-id", "corpus_id", "doc_id", "docid")
GRADES = ("score", "relevance")
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".parquet", ".tsv", ".tsv.gz")
EVALUATION = ("eval", "dev", "validation")
"""Splits that are taken for `eval`, the first that is there."""
NAMED = 5
Grades = dict[str, dict[str, float]]
"""By query, the grade of each judged document."""


class BEIR(ptrain.Source):
    """`beir`: each judged query with its positives and negatives."""

    class Config(ptrain.SourceConfig):
        """Keys of `beir`."""

        not_prepared: ClassVar[frozenset[str]] = frozenset({"path"})

        path: str
        """The folder."""
        titles: bool = True
        """Put the title of a document before its text."""
        min_grade: float = 1
        """Documents that are judged at least so relevant are positives; the others that are judged are negatives."""

    def load(self, run: Run, split: str) -> Dataset:
        """A row for each judged query that has a positive: `query`, `positives`, `negatives`.

        Raises:
            DataError: a file is missing or has no rows, or the judgements name what is not there.
        """
        import pyarrow as pa

        from ptrain.data.arrow import blocks, open_arrow, write_batches
        from ptrain.data.workspace import workspace

        texts = pa.list_(pa.string())
        schema = pa.schema({"query": pa.string(), "positives": texts, "negatives": texts, "origin": pa.string()})
        batches = (pa.RecordBatch.from_pylist(block, schema) for block in blocks(self._rows(run, split)))
        return open_arrow(write_batches(batches, schema, workspace().path("beir.arrow")))

    def fingerprint(self) -> Any:
        """Name, size and hash of each file."""
        from ptrain.data.sources.base import content_hashes

        folder = folder_of(self.config.path)
        kept = {"corpus", "queries", "qrels"}
        return content_hashes(
            path for path in sorted(folder.rglob("*"))
            if path.is_file() and path.relative_to(folder).parts[0].partition(".")[0] in kept
        )  # fmt: skip

    def _rows(self, run: Run, split: str) -> Iterator[dict[str, Any]]:
        folder, least = folder_of(self.config.path), self.config.min_grade
        grades = read_qrels(folder, split)
        queries = read_queries(folder)
        wanted = {document for judged in grades.values() for document in judged}
        documents = dict(read_corpus(folder, titles=self.config.titles, wanted=wanted))
        refuse_unknown(folder, grades, queries, documents)
        answered = {query: judged for query, judged in grades.items() if max(judged.values()) >= least}
        if len(answered) < len(grades):
            left = len(grades) - len(answered)
            run.warn(f"{left} of {len(grades)} judged queries in `{folder}` have no positive, and are left out")
        for query, judged in answered.items():
            yield {
                "query": queries[query],
                "positives": [documents[one] for one, grade in judged.items() if grade >= least],
                "negatives": [documents[one] for one, grade in judged.items() if grade < least],
                "origin": f"{folder}: query {query}",
            }


def folder_of(path: str) -> Path:
    """The folder at `path`.

    Raises:
        DataError: there is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"`{path}` is no folder", expected="a folder with `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv`"
        )
    return folder


def read_queries(folder: Path) -> dict[str, str]:
    """The text of each query by its id, in the order of the file.

    Raises:
        DataError: there is no such file, it has no queries, or one has no id or no text, or an id comes twice.
    """
    return dict(_texts(_file(folder, "queries"), titles=False))


def read_corpus(
    folder: Path, *, titles: bool = True, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, str]]:
    """`(id, text)` of each document, in the order of the file; the corpus need not fit into memory.

    Args:
        titles: put the title before the text.
        wanted: only documents with these ids.

    Raises:
        DataError: there is no such file, it has no documents, or one has no id, or an id comes twice.
    """
    return _texts(_file(folder, "corpus"), titles=titles, wanted=wanted)


def read_qrels(folder: Path, split: str) -> Grades:
    """The judgements of a split (for `eval` those of `dev` or `validation`, where there are no others).

    Raises:
        DataError: there is no file for the split, it has no judgements, or one has no query, document or grade.
    """
    grades: Grades = {}
    for row in _read(_qrels_file(folder, split)):
        query, document = (_named(row, names) for names in (QUERY_IDS, DOCUMENT_IDS))
        grades.setdefault(query, {})[document] = _grade(row)
    return grades


def refuse_unknown(folder: Path, grades: Grades, queries: Collection[str], documents: Collection[str]) -> None:
    """Raise DataError where judgements name queries or documents that are not there."""
    judged = dict.fromkeys(document for one in grades.values() for document in one)
    for what, file, names, known in (
        ("queries", "queries", grades, queries),
        ("documents", "corpus", judged, documents),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            named = ", ".join(f"`{name}`" for name in unknown[:NAMED]) + (", ..." if len(unknown) > NAMED else "")
            raise DataError(
                f"the judgements in `{folder}` name {len(unknown)} {what} that `{_file(folder, file).name}` does not "
                f"have: {named}",
                expected=f"an `_id` of `{_file(folder, file).name}` in each judgement",
                fix="see whether the files belong together",
            )


def _file(folder: Path, name: str) -> Path:
    found = [folder / f"{name}{ending}" for ending in ENDINGS if (folder / f"{name}{ending}").is_file()]
    if not found:
        raise DataError(f"`{folder}` has no file `{name}.jsonl`", expected=f"`{name}` with one of {', '.join(ENDINGS)}")
    if len(found) > 1:
        raise DataError(f"`{folder}` has both `{found[0].name}` and `{found[1].name}`", expected="one of them")
    return found[0]


def _qrels_file(folder: Path, split: str) -> Path:
    names = EVALUATION if split == "eval" else (split,)
    there = folder / "qrels"
    if not there.is_dir():
        return _file(folder, "qrels")
    for name in names:
        if any((there / f"{name}{ending}").is_file() for ending in ENDINGS):
            return _file(there, name)
    splits = sorted({path.name.partition(".")[0] for path in there.iterdir()})
    raise DataError(
        f"`{there}` has no judgements for the split `{split}`",
        expected=f"one of {', '.join(f'`{name}`' for name in splits)}" if splits else f"a file `{split}.tsv`",
        fix=f"write `split: {splits[0]}`" if splits else None,
    )


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, each with its `origin`."""
    from ptrain.data.sources.local import CsvFiles, JsonLinesFiles, ParquetFiles

    if path.suffix == ".parquet":
        return ParquetFiles(ParquetFiles.Config(path=str(path))).read(path)
    if ".tsv" in path.suffixes:
        return CsvFiles(CsvFiles.Config(path=str(path), delimiter="\t")).read(path)
    return JsonLinesFiles(JsonLinesFiles.Config(path=str(path))).read(path)


def _texts(path: Path, *, titles: bool, wanted: Collection[str] | None = None) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for row in _read(path):
        name = _named(row, IDS)
        if name in seen:
            raise DataError(f"{row['origin']}: the id `{name}` comes a second time", expected="each id once")
        seen.add(name)
        if wanted is None or name in wanted:
            yield name, _text(row, titles)


def _text(row: Mapping[str, Any], titles: bool) -> str:
    text, title = row.get("text"), (row.get("title") if titles else None) or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise DataError(f"{row['origin']}: there is no `text`, or it is none", expected="`_id` and `text`, and `title`")
    return f"{title} {text}".strip()


def _named(row: Mapping[str, Any], names: Sequence[str]) -> str:
    found = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if found is None:
        raise DataError(f"{row['origin']}: there is no `{names[0]}`", expected=f"one of {', '.join(names)}")
    return str(found)


def _grade(row: Mapping[str, Any]) -> float:
    given = next((row[name] for name in GRADES if name in row), None)
    try:
        return float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(f"{row['origin']}: `score` is {given!r}", expected="a number") from None
