"""The source `beir`: every form of its files gives the rows that the judgements mean; what is wrong is named."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ptrain import DataError
from ptrain.recipe.load import load_recipe
from ptrain.run import Run
from ptrain_embed.beir import BEIR, read_corpus, read_qrels, read_queries

DATA = Path(__file__).parents[4] / "shared" / "data" / "embed" / "medquad_retrieval"
CORPUS = [
    {"_id": "d1", "title": "T", "text": "one"},
    {"_id": "d2", "title": "", "text": "two"},
    {"_id": 3, "text": "three"},
]
QUERIES = [{"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"}, {"_id": "q3", "text": "third"}]
JUDGED = [("q1", "d1", 2), ("q1", "3", 0), ("q2", "d2", 1), ("q2", "d1", 1), ("q3", "d1", 0)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def judgements(rows: list[tuple[Any, ...]] = JUDGED) -> str:
    return "query-id\tcorpus-id\tscore\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as BEIR has them."""
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(lines(CORPUS))
    (tmp_path / "queries.jsonl").write_text(lines(QUERIES))
    (tmp_path / "qrels" / "train.tsv").write_text(judgements())
    (tmp_path / "qrels" / "dev.tsv").write_text(judgements([("q2", "d1", 1)]))
    return tmp_path


def load(folder: Path, split: str = "train", **keys: Any) -> list[dict[str, Any]]:
    recipe = {
        "type": "sft", "model": {"config": {"model_type": "llama"}}, "tokenizer": {"type": "train"},
        "data": {"sources": [{"type": "tasks"}]},
    }  # fmt: skip
    source = BEIR(BEIR.Config(type="beir", path=str(folder), **keys))
    return source.load(Run(load_recipe(recipe), folder / "run"), split).to_list()


def expected(folder: Path, first: str = "T one") -> list[dict[str, Any]]:
    return [
        {"query": "first", "positives": [first], "negatives": ["three"], "origin": f"{folder}: query q1"},
        {"query": "second", "positives": ["two", first], "negatives": [], "origin": f"{folder}: query q2"},
    ]


def test_each_judged_query_is_a_row(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the documents that are relevant enough; one without any is left out, and that is said."""
    with caplog.at_level(logging.WARNING, logger="ptrain"):
        assert load(folder) == expected(folder)
    assert "1 of 3 judged queries" in caplog.text and "have no positive, and are left out" in caplog.text
    assert load(folder, titles=False) == expected(folder, "one")
    (only,) = load(folder, min_grade=2)
    assert (only["positives"], only["negatives"]) == (["T one"], ["three"])
    assert [row["query"] for row in load(folder, "eval")] == ["second"]


def as_parquet(folder: Path) -> None:
    for name, rows in (("corpus", CORPUS), ("queries", QUERIES)):
        (folder / f"{name}.jsonl").unlink()
        ids = [{**row, "_id": str(row["_id"])} for row in rows]
        pq.write_table(pa.Table.from_pylist(ids), folder / f"{name}.parquet")
    names = ("query-id", "corpus-id", "score")
    (folder / "qrels" / "train.tsv").unlink()
    judged = [dict(zip(names, row, strict=True)) for row in JUDGED]
    pq.write_table(pa.Table.from_pylist(judged), folder / "qrels" / "train.parquet")


def as_packed_lines(folder: Path) -> None:
    """One file of judgements for every split, with the other spelling of its columns."""
    for path in (folder / "corpus.jsonl", folder / "queries.jsonl"):
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    for path in (folder / "qrels").iterdir():
        path.unlink()
    (folder / "qrels").rmdir()
    names = ("query_id", "corpus_id", "score")
    text = lines([dict(zip(names, row, strict=True)) for row in JUDGED])
    (folder / "qrels.jsonl.gz").write_bytes(gzip.compress(text.encode()))


@pytest.mark.parametrize("change", [as_parquet, as_packed_lines])
def test_every_form_of_the_files_is_read(folder: Path, change: Callable[[Path], None]) -> None:
    before = BEIR(BEIR.Config(type="beir", path=str(folder))).fingerprint()
    change(folder)
    assert load(folder) == expected(folder)
    assert BEIR(BEIR.Config(type="beir", path=str(folder))).fingerprint() != before


def test_only_its_own_files_are_its_content(folder: Path) -> None:
    source = BEIR(BEIR.Config(type="beir", path=str(folder)))
    before = source.fingerprint()
    (folder / "notes.txt").write_text("no rows")
    assert source.fingerprint() == before and len(before) == 4
    (folder / "qrels" / "train.tsv").write_text(judgements(JUDGED[:1]))
    assert source.fingerprint() != before


BAD: dict[str, tuple[str, str | None, str]] = {
    "no corpus": ("corpus.jsonl", None, "has no file `corpus.jsonl`"),
    "an empty corpus": ("corpus.jsonl", "", "corpus.jsonl` has no rows"),
    "no judgements": ("qrels/train.tsv", "query-id\tcorpus-id\tscore\n", "train.tsv` has no rows"),
    "no such split": ("qrels/train.tsv", None, "no judgements for the split `train`"),
    "an unknown query": (
        "qrels/train.tsv", judgements([("q1", "d1", 1), ("q9", "d1", 1)]),
        "name 1 queries that `queries.jsonl` does not have: `q9`",
    ),
    "unknown documents": (
        "qrels/train.tsv", judgements([("q1", f"x{at}", 1) for at in range(7)]),
        "name 7 documents that `corpus.jsonl` does not have: `x0`, `x1`, `x2`, `x3`, `x4`, ...",
    ),
    "a grade that is none": ("qrels/train.tsv", judgements([("q1", "d1", "high")]), "train.tsv:2: `score` is 'high'"),
    "a judgement of nothing": ("qrels/train.tsv", judgements([("q1", "", 1)]), "train.tsv:2: there is no `corpus-id`"),
    "an id twice": ("corpus.jsonl", lines([*CORPUS, CORPUS[0]]), "corpus.jsonl:4: the id `d1` comes a second time"),
    "a document without an id": ("corpus.jsonl", lines([{"text": "a"}]), "corpus.jsonl:1: there is no `_id`"),
    "a query without text": ("queries.jsonl", lines([{"_id": "q1"}]), "queries.jsonl:1: there is no `text`"),
    "two of a kind": ("corpus.jsonl.gz", "", "has both `corpus.jsonl` and `corpus.jsonl.gz`"),
    "lines that are none": ("queries.jsonl", "nothing\n", "queries.jsonl:1:1: this line is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(folder: Path, name: str) -> None:
    file, text, told = BAD[name]
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(DataError) as error:
        load(folder)
    assert told in str(error.value) and "expected: " in str(error.value) and error.value.exit_code == 2


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    for call in (lambda source: source.fingerprint(), lambda source: source.load(None, "train")):
        with pytest.raises(DataError, match="is no folder"):
            call(BEIR(BEIR.Config(type="beir", path=str(tmp_path / "nothing"))))


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data files are not there (../shared/data)")
def test_real_judgements() -> None:
    """Every judgement of the file is in the rows, as the grade says."""
    with gzip.open(DATA / "qrels.jsonl.gz", "rt") as file:
        judged = [json.loads(line) for line in file]
    texts, queries = dict(read_corpus(DATA, titles=False)), read_queries(DATA)
    assert sum(map(len, read_qrels(DATA, "train").values())) == len(judged)
    rows = {row["origin"].rpartition(" ")[2]: row for row in load(DATA, titles=False, min_grade=2)}
    assert len(rows) == len(queries) == 1000
    for one in judged:
        row = rows[one["query_id"]]
        assert row["query"] == queries[one["query_id"]]
        assert texts[one["corpus_id"]] in row["positives" if one["score"] == 2 else "negatives"]
    assert sum(len(row["positives"]) + len(row["negatives"]) for row in rows.values()) == len(judged)
