"""The source `token-batches`: no label of a stored batch is lost, copied or streamed, from a disk or another store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ptrain import DataError, RecipeError
from ptrain.data.cache import Prepared
from ptrain.job import prepare_data
from ptrain.recipe.load import load_recipe
from ptrain_embed.loaders import create_loader
from ptrain_embed.rows import content_key

VOCABULARY, QUERIES, DOCUMENTS = 200, 6, 9
Labels = dict[tuple[tuple[int, ...], tuple[int, ...]], int]
"""Relation by the tokens of query and document."""


def store(folder: Path, seed: int, **changes: Any) -> Labels:
    """Write a batch; return its labels. A document may have labels for several queries, one has none."""
    rng = np.random.default_rng(seed)
    texts = [[rng.integers(3, VOCABULARY, rng.integers(2, 9)).tolist() for _ in range(n)] for n in (QUERIES, DOCUMENTS)]
    names = [(1000 + rng.permutation(n)).tolist() for n in (QUERIES, DOCUMENTS)]
    pairs = [(query, query) for query in range(QUERIES)]
    pairs += [(query, (query + step) % (DOCUMENTS - 1)) for query in range(QUERIES) for step in (1, 3)]
    relations = [1] * QUERIES + rng.choice([1, -1], len(pairs) - QUERIES).tolist()
    tables = {
        "queries": {"BATCH_QUERY_ID": names[0], "QUERY_TOKEN_ID_LIST": texts[0]},
        "documents": {"BATCH_DOCUMENT_ID": names[1], "DOCUMENT_TOKEN_ID_LIST": texts[1]},
        "relations": {
            "BATCH_QUERY_ID": [names[0][query] for query, _ in pairs],
            "BATCH_DOCUMENT_ID": [names[1][document] for _, document in pairs],
            "RELEVANCE": relations,
        },
    }
    folder.mkdir(parents=True)
    for name, columns in tables.items():
        made = {**columns, **changes.get(name, {})}
        pq.write_table(
            pa.table({key: value for key, value in made.items() if value is not None}), folder / f"{name}.parquet"
        )
    labels = {
        (tuple(texts[0][query]), tuple(texts[1][document])): relation
        for (query, document), relation in zip(pairs, relations, strict=True)
    }
    return {**labels, (tuple(texts[0][0]), tuple(texts[1][-1])): 0}


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, list[Labels]]:
    """A folder of three batches, and the labels of each."""
    folder = tmp_path / "batches"
    labels = [store(folder / f"batch_{at:08d}", at) for at in range(3)]
    (folder / "metadata.json").write_text("{}")
    return folder, labels


@pytest.fixture
def uploaded(stored: tuple[Path, list[Labels]]) -> Iterator[str]:
    """The same in a store that is no disk."""
    system = fsspec.filesystem("memory")
    system.put(str(stored[0]), "/bucket/", recursive=True)
    yield "memory://bucket/batches"
    system.rm("/bucket", recursive=True)


Prepare = Callable[..., tuple[Any, Prepared]]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    """Prepares a source of stored batches."""
    raw = Tokenizer(models.WordLevel({f"w{at}": at for at in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w1").save_pretrained(tmp_path / "tokenizer")

    def prepare(path: Any, *, data: Any = None, micro: int = 2, **keys: Any) -> tuple[Any, Prepared]:
        recipe = {
            "type": "embed", "micro_batch_size": micro,
            "model": {"config": {"model_type": "bert", "vocab_size": VOCABULARY}},
            "tokenizer": {"name_or_path": str(tmp_path / "tokenizer")},
            "data": {
                "sources": [{"type": "token-batches", "path": str(path), **keys}], "cache_dir": str(tmp_path / "cache"),
                **(data or {}),
            },
        }  # fmt: skip
        return prepare_data(load_recipe(recipe), tmp_path / "run")

    return prepare


def batches_of(run: Any, found: Prepared, *, rank: int = 0, world: int = 1, epochs: int = 1) -> list[dict[str, Any]]:
    """All micro-batches that a worker gets."""
    run.data_rank, run.data_world, run.progress.step = rank, world, 0
    loader = create_loader(run, "train", found.train)
    return list(islice(loader, epochs * loader.steps_per_epoch))


def labels_of(batch: dict[str, Any]) -> Labels:
    """What the rows of a batch say, by their tokens."""
    found: Labels = {}
    for at in range(batch["rows"]):
        texts = np.split(batch["input_ids"][at].numpy(), np.cumsum(batch["document_lengths"][at]))[:-1]
        query, *documents = [tuple(one.tolist()) for one in texts]
        found.update({(query, one): label for one, label in zip(documents, batch["relations"][at], strict=True)})
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["disk", "storage"])
def test_no_label_is_lost(
    stored: tuple[Path, list[Labels]], uploaded: str, prepared: Prepare, stream: bool, place: str
) -> None:
    """All workers together have every label once an epoch, and a step has rows of one stored batch."""
    folder, labels = stored
    path = folder if place == "disk" else uploaded
    run, found = prepared(path, stream=stream, data={"batch_from": "one_source"})
    assert len(found.train) == 3 * QUERIES
    parts = [batches_of(run, found, rank=rank, world=2, epochs=2) for rank in range(2)]
    steps = [{**labels_of(one), **labels_of(other)} for one, other in zip(*parts, strict=True)]
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        assert {pair: label for step in epoch for pair, label in step.items()} == {
            pair: label for one in labels for pair, label in one.items()
        }
    for step in steps:
        assert sum(step.items() <= one.items() for one in labels) == 1


def test_streamed_batches_are_read_in_turn_and_whole(stored: tuple[Path, list[Labels]], prepared: Prepare) -> None:
    """As copied ones hold them; nothing but places is in the cache; each batch is read once an epoch."""
    folder, _ = stored
    run, found = prepared(folder, stream=True, data={"batch_from": "one_source"})
    assert found.report["train"]["tokens"] == sum(1 + len(one) for one in found.train["relations"])
    (source,) = run.parts.sources
    read, opened = source.read, []
    source.read = lambda batch, **keys: (opened.append(batch), read(batch, **keys))[1]
    sets = [set(batch["set"]) for batch in batches_of(run, found, epochs=2)]
    assert sorted(opened[:3]) == source.batches and all(len(one) == 1 for one in sets)
    assert len(opened) <= 6
    assert [one for at, one in enumerate(sets) if not at or sets[at - 1] != one][:3] == [
        *dict.fromkeys(map(frozenset, sets))
    ]


def test_copied_batches_know_the_content(stored: tuple[Path, list[Labels]], prepared: Prepare) -> None:
    """Texts that two batches have are one text; the positives of a query are those of all batches."""
    folder, _ = stored
    shutil.copytree(folder / "batch_00000000", folder / "batch_00000009")
    _, found = prepared(folder)
    assert len(found.train) == 4 * QUERIES
    for first, again in zip(range(QUERIES), range(3 * QUERIES, 4 * QUERIES), strict=True):
        one, other = found.train[first], found.train[again]
        assert one["query_key"] == other["query_key"] and one["document_keys"] == other["document_keys"]
        assert one["group"] == other["group"] and one["set"] != other["set"]
        lengths = one["document_lengths"]
        query = np.array(one["input_ids"][: lengths[0]], dtype=np.int32)
        assert one["query_key"] == content_key(query.tobytes())
        positive = [key for key, relation in zip(one["document_keys"], one["relations"], strict=True) if relation == 1]
        assert sorted(one["positive_keys"]) == sorted(positive)


def test_scores_of_a_teacher_come_along(tmp_path: Path, prepared: Prepare) -> None:
    scores = np.arange(3 * QUERIES, dtype=np.float32).tolist()
    relations = {"SCORE": scores}
    store(tmp_path / "batches" / "batch_0", 0, relations=relations)
    _, found = prepared(tmp_path / "batches")
    # The document without a relation has no score, nor has the query that it goes to.
    assert found.train["scores"][:] == [
        [],
        *([scores[at], scores[QUERIES + 2 * at], scores[QUERIES + 2 * at + 1]] for at in range(1, QUERIES)),
    ]


@pytest.mark.parametrize("place", ["disk", "storage"])
def test_a_change_of_what_is_stored_is_seen(
    stored: tuple[Path, list[Labels]], uploaded: str, prepared: Prepare, place: str
) -> None:
    """Prepared anew, and other rows, with which no run is resumed: streamed ones too, of which but places are kept."""
    path, system = (
        (stored[0], fsspec.filesystem("file")) if place == "disk" else (uploaded, fsspec.filesystem("memory"))
    )
    kinds = ({}, {"stream": True, "data": {"batch_from": "one_source"}})
    first = [prepared(path, **keys)[1] for keys in kinds]
    assert [prepared(path, **keys)[1].path for keys in kinds] == [one.path for one in first]
    with system.open(f"{path}/batch_00000001/queries.parquet", "rb") as file:
        table = pq.read_table(file)
    tokens = pa.array([[5, *ids[1:]] for ids in table["QUERY_TOKEN_ID_LIST"].to_pylist()])
    with system.open(f"{path}/batch_00000001/queries.parquet", "wb") as file:
        pq.write_table(table.set_column(1, "QUERY_TOKEN_ID_LIST", tokens), file)
    for keys, before in zip(kinds, first, strict=True):
        after = prepared(path, **keys)[1]
        assert after.path != before.path and after.digest() != before.digest()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a query twice": ({"queries": {"BATCH_QUERY_ID": [1] * QUERIES}}, "queries.parquet`: the id `1` comes a second time"),
    "a label that is none": ({"relations": {"RELEVANCE": [2] * 3 * QUERIES}}, "`RELEVANCE` is 2"),
    "a label of what is not there": (
        {"relations": {"BATCH_DOCUMENT_ID": [7] * 3 * QUERIES}}, "names the id `7`, which is not in `documents.parquet`",
    ),
    "labels that contradict": (
        {"relations": {"BATCH_QUERY_ID": [1000] * 18, "BATCH_DOCUMENT_ID": [1000] * 18, "RELEVANCE": [1, -1] * 9}},
        "has two relations of the query `1000` to the document `1000`",
    ),
    "no tokens": ({"documents": {"DOCUMENT_TOKEN_ID_LIST": None}}, "has no column `DOCUMENT_TOKEN_ID_LIST`"),
    "tokens of another tokenizer": (
        {"queries": {"QUERY_TOKEN_ID_LIST": [[5, VOCABULARY]] * QUERIES}},
        f"there is a token {VOCABULARY}, and the tokenizer has {VOCABULARY}",
    ),
    "an empty text": ({"queries": {"QUERY_TOKEN_ID_LIST": [[5], [], *[[6]] * (QUERIES - 2)]}}, "the query has no token"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_broken_batches_are_refused_by_name(tmp_path: Path, prepared: Prepare, name: str) -> None:
    changes, told = BAD[name]
    store(tmp_path / "batches" / "batch_0", 0, **changes)
    with pytest.raises(DataError) as error:
        prepared(tmp_path / "batches")
    assert told in str(error.value) and "batch_0" in str(error.value) and error.value.exit_code == 2


def test_what_is_not_there_or_can_not_be_read_is_named(tmp_path: Path, prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"not found: .*nothing"):
        prepared(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"not found: .*nothing"):
        prepared("memory://nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no batches"):
        prepared(tmp_path / "empty")
    with pytest.raises(DataError, match="can't be read: Protocol not known: nosuch"):
        prepared("nosuch://bucket/batches")
    store(tmp_path / "batches" / "batch_0", 0)
    (tmp_path / "batches" / "batch_0" / "relations.parquet").write_bytes(b"PAR1 nothing more")
    with pytest.raises(DataError, match=r"relations.parquet` can't be read as Parquet"):
        prepared(tmp_path / "batches")
    (tmp_path / "batches" / "batch_0" / "relations.parquet").unlink()
    with pytest.raises(DataError, match=r"not found: .*relations.parquet"):
        prepared(tmp_path / "batches")


def test_streamed_batches_are_not_mixed(stored: tuple[Path, list[Labels]], prepared: Prepare) -> None:
    with pytest.raises(RecipeError, match="mixes rows of all stored batches"):
        prepared(stored[0], stream=True)


def test_long_texts_are_cut_before_their_last_token(tmp_path: Path, prepared: Prepare) -> None:
    """Copied and streamed alike."""
    long = {"QUERY_TOKEN_ID_LIST": [[3, 4, 5, 6, 7, 9]] * QUERIES}
    store(tmp_path / "batches" / "batch_0", 0, queries=long)
    for stream in (False, True):
        data = {"batch_from": "one_source", "max_query_length": 4}
        run, found = prepared(tmp_path / "batches", stream=stream, data=data)
        for batch in batches_of(run, found):
            assert batch["input_ids"][:, :4].tolist() == [[3, 4, 5, 9]] * batch["rows"]
    assert json.dumps(found.report)
