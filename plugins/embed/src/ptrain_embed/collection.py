"""What retrieval is measured on: a corpus, queries, and which document is right for which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptrain import DataError


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgements.

    Attributes:
        documents, queries: texts by id; queries with a relevant document alone.
        qrels: grades by id of the query and of the document; what is above 0 is relevant.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, float]]


def read_collection(path: str, split: str = "test", *, titles: bool = True) -> Collection:
    """The collection in a folder, in the form of BEIR.

    Args:
        split: which of the files in `qrels`, where that is a folder.
        titles: put the title of a document before its text.

    Raises:
        DataError: a file is missing or empty, a row is wrong, judgements name unknown ids or nothing relevant.
    """
    from ptrain_embed import beir

    folder = beir.folder_of(path)
    qrels, queries = beir.read_qrels(folder, split), beir.read_queries(folder)
    documents = dict(beir.read_corpus(folder, titles=titles))
    beir.refuse_unknown(folder, qrels, queries, documents)
    judged = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not judged:
        raise DataError(f"the judgements in `{folder}` name no relevant document", expected="a `score` above 0")
    return Collection(documents, {name: queries[name] for name in judged}, judged)


def corpus_texts(path: str) -> Iterator[str]:
    """The text of every document of a folder with a corpus, or of a file with the column `text`.

    Some published corpora have documents without any text, from which there is nothing to be told.

    Raises:
        DataError: there is none, or a row is wrong.
    """
    from ptrain_embed import beir

    if Path(path).is_dir():
        yield from (text for _, text in beir.read_corpus(beir.folder_of(path)) if text)
        return
    for row in read_table(path):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise DataError(f"{row['origin']}: there is no `text`", expected="text")
        yield row["text"]


def read_table(path: str) -> Iterator[dict]:
    """The rows of the file or files at `path`, each with its `origin` for messages.

    Raises:
        DataError: there is none, it is empty or broken, or of an unknown form.
    """
    from ptrain.data.sources import local

    kinds = {".jsonl": local.JsonLinesFiles, ".json": local.JsonFiles, ".parquet": local.ParquetFiles,
             ".csv": local.CsvFiles}  # fmt: skip
    found = [kinds[suffix] for suffix in Path(path).suffixes if suffix in kinds]
    if not found:
        raise DataError(f"`{path}` has no form that is known", expected=f"a file that ends in {', '.join(kinds)}")
    source = found[-1](found[-1].Config(path=path))
    for file in source.files():
        yield from source.read(file)
