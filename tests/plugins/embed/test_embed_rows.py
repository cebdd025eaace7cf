"""The shapes of rows for `embed`: each is read as the query and documents that it means, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain import DataError
from ptrain_embed.rows import Row, read_row, text_key

pytestmark = pytest.mark.torch_free

SHAPES: dict[str, tuple[dict[str, Any], Row]] = {
    "anchor and positive": ({"anchor": "q", "positive": "d"}, Row("q", ["d"], [1])),
    "question and answer": ({"question": "q", "answer": "d", "id": 7}, Row("q", ["d"], [1])),
    "query and document": ({"query": "q", "document": "d", "origin": "f:1"}, Row("q", ["d"], [1])),
    "query and response": ({"query": "q", "response": "d"}, Row("q", ["d"], [1])),
    "sentences": ({"sentence1": "q", "sentence2": "d"}, Row("q", ["d"], [1], alike=True)),
    "a triplet": ({"query": "q", "positive": "d", "negative": "n"}, Row("q", ["d", "n"], [1, -1])),
    "numbered negatives": (
        {"query": "q", "positive": "d", "negative_1": "n", "negative_2": "m"},
        Row("q", ["d", "n", "m"], [1, -1, -1]),
    ),
    "lists": (
        {"query": "q", "positives": ["d", "e"], "negatives": ["n"], "scores": [2, 1.5, 0]},
        Row("q", ["d", "e", "n"], [1, 1, -1], [2.0, 1.5, 0.0]),
    ),
    "short names": ({"query": "q", "pos": ["d"], "neg": ["n", "m"]}, Row("q", ["d", "n", "m"], [1, -1, -1])),
    "lists without scores": ({"query": "q", "positives": ["d"], "negatives": [], "scores": []}, Row("q", ["d"], [1])),
    "nothing where it is not known": ({"query": "q", "positive": "d", "negative": None}, Row("q", ["d"], [1])),
    "a pair with a score": ({"query": "q", "positive": "d", "score": 3}, Row("q", ["d"], [1], [3.0])),
    "a graded pair": ({"sentence1": "q", "sentence2": "d", "score": 2.5}, Row("q", ["d"], [0], [2.5], alike=True)),
    "negatives with scores alone": ({"query": "q", "negatives": ["n"], "scores": [1]}, Row("q", ["n"], [-1], [1.0])),
    "labels of every document": (
        {"query": "q", "documents": ["a", "b", "c"], "relations": [1, 0, -1], "scores": [3, 2, 1]},
        Row("q", ["a", "b", "c"], [1, 0, -1], [3.0, 2.0, 1.0]),
    ),
    "scores of every document": ({"query": "q", "documents": ["a"], "scores": [3]}, Row("q", ["a"], [0], [3.0])),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_read(name: str) -> None:
    row, expected = SHAPES[name]
    assert read_row(row, "f:1") == expected


def test_columns_of_other_names() -> None:
    """What is said to hold something holds it, whatever else the row has."""
    row = {"title": "q", "body": "d", "worse": ["n"], "points": [2, 1], "query": "no", "positive": "no"}
    columns = {"query": "title", "positive": "body", "negative": "worse", "score": "points"}
    assert read_row(row, "f:1", columns) == Row("q", ["d", "n"], [1, -1], [2.0, 1.0])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no query": ({"positive": "d"}, "there is no query (the row has `positive`)"),
    "nothing": ({"origin": "f:7"}, "there is no query (the row has no columns)"),
    "no partner": ({"query": "q", "id": 3}, "the query has no partner (the row has `query`, `id`)"),
    "a partner that is null": ({"anchor": "q", "positive": None}, "the query has no partner"),
    "no positive": ({"query": "q", "negatives": ["n"]}, "the query has negatives, and no positive"),
    "an empty query": ({"query": " ", "positive": "d"}, "`query` is empty"),
    "an empty partner": ({"query": "q", "positive": ""}, "`positive` is empty"),
    "a number": ({"query": "q", "positive": 3}, "`positive` is int 3"),
    "a number in a list": ({"query": "q", "positives": ["d", 3]}, "`positives[1]` is int 3"),
    "an empty negative": ({"query": "q", "positive": "d", "negatives": ["n", ""]}, "`negatives[1]` is empty"),
    "two that might be the query": ({"query": "q", "question": "r", "positive": "d"}, "`query`, `question` might each"),
    "two that might be positives": ({"query": "q", "document": "d", "answer": "e"}, "`document`, `answer` might each"),
    "too few scores": ({"query": "q", "positives": ["d", "e"], "scores": [1]}, "there are 1 scores for 2 documents"),
    "a score that is text": ({"query": "q", "positive": "d", "score": "high"}, '`score` is "high"'),
    "a score that is no number": ({"query": "q", "positive": "d", "score": float("nan")}, "`score` is float nan"),
    "a score that is true": ({"sentence1": "q", "sentence2": "d", "score": True}, "`score` is bool True"),
    "relations that are none": ({"query": "q", "documents": ["d"], "relations": [2]}, "`relations` is list [2]"),
    "relations of others": ({"query": "q", "documents": ["d"], "relations": [1, 1]}, "1 `documents`, and 2 `relations`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_wrong_are_refused_by_name(name: str) -> None:
    row, told = BAD[name]
    with pytest.raises(DataError) as error:
        read_row(row, "pairs.jsonl:7")
    assert told in str(error.value) and "pairs.jsonl:7" in str(error.value) and "expected: " in str(error.value)
    assert error.value.exit_code == 2


text = st.text(min_size=1, max_size=8).filter(str.strip)


@given(query=text, positives=st.lists(text, min_size=1, max_size=4), negatives=st.lists(text, max_size=4))
def test_no_text_is_lost_or_changed(query: str, positives: list[str], negatives: list[str]) -> None:
    """Whatever the texts are, the row has them in their order, each with what it is."""
    row = read_row({"query": query, "positives": positives, "negatives": negatives}, "f:1")
    assert row == Row(query, positives + negatives, [1] * len(positives) + [-1] * len(negatives))


@given(st.lists(text, min_size=2, max_size=20, unique=True))
def test_texts_have_one_key_each(texts: list[str]) -> None:
    keys = [text_key(one) for one in texts]
    assert len(set(keys)) == len(texts) and all(-(2**63) <= key < 2**63 for key in keys)
    assert keys == [text_key(str(one.encode(errors="surrogatepass"), errors="surrogatepass")) for one in texts]
