"""Rows to documents: over-length policies, rows without labels, rows that are tokens already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from families import family
from hypothesis import given, settings
from hypothesis import strategies as st

from ptrain.data import processes as processes_module
from ptrain.data import shards
from ptrain.data.documents import Documents
from ptrain.data.encode import IGNORED
from ptrain.data.process import counted, encode_conversations, encode_texts
from ptrain.data.report import Report
from ptrain.data.rows import canonical_messages, message_type
from ptrain.data.workspace import Workspace, using
from ptrain.errors import DataError, PtrainError


def chats(pairs: list[tuple[str, str]], **columns: Any) -> Dataset:
    """Conversations of one turn in canonical form."""
    import pyarrow as pa

    said = [canonical_messages([{"role": "user", "content": q}, {"role": "assistant", "content": a}]) for q, a in pairs]
    names = [f"chats.jsonl:{at}" for at in range(1, len(pairs) + 1)]
    table = pa.table({"messages": pa.array(said, type=message_type()), "origin": names, **columns})
    return Dataset(table)


TOKENIZER = family("chatml")
SHORT = ("a", "b")
LONG = ("question " * 3, "12345678 " * 20)


def length(pair: tuple[str, str], tokenizer: Any = TOKENIZER) -> int:
    """Tokens of a conversation of one turn, by transformers' own way."""
    said = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return len(tokenizer.apply_chat_template(said, tokenize=True, return_dict=True)["input_ids"])


def pieces(documents: Documents) -> list[tuple[list[int], list[int]]]:
    """`(ids, labels)` of every document."""
    found = [documents.piece((at, 0, int(n))) for at, n in enumerate(documents.lengths)]
    return [(ids.tolist(), labels.tolist()) for ids, labels in found]


TEN = [LONG if at in (2, 5, 9) else SHORT for at in range(10)]
LIMIT = length(SHORT) + 4


def encoded(policy: Any, tokenizer: Any = TOKENIZER, limit: int = LIMIT) -> tuple[Documents, Report]:
    report = Report()
    documents = encode_conversations(
        chats(TEN), tokenizer, report, max_length=limit, overlength=policy, max_unsupervised=1.0
    )
    return documents, report


def test_overlength_error_names_the_rows() -> None:
    """Three of ten are too long."""
    with pytest.raises(DataError) as caught:
        encoded("error")
    text = str(caught.value)
    assert f"3 of 10 rows are longer than `data.max_length` ({LIMIT} tokens)" in text
    assert "chats.jsonl:3, chats.jsonl:6, chats.jsonl:10" in text and "data.overlength" in text


def test_overlength_drop() -> None:
    """Seven rows stay; rows and tokens lost are counted."""
    documents, report = encoded("drop")
    assert documents.lengths.tolist() == [length(SHORT)] * 7
    assert (report.rows, report.documents, report.lost_tokens) == (10, 7, 3 * length(LONG))
    assert report.dropped == {"longer than max_length (drop)": 3}


@pytest.mark.parametrize("side", ["left", "right"])
def test_overlength_truncate(side: str) -> None:
    """The last or the first tokens stay; cut to the question alone, a row has nothing to learn and is named."""
    whole = pieces(encode_conversations(chats([LONG]), TOKENIZER, Report()))[0]
    documents, report = encoded(f"truncate_{side}")
    if side == "left":
        ids, labels = pieces(documents)[2]
        assert (ids, labels) == (whole[0][-LIMIT:], whole[1][-LIMIT:])
        assert report.dropped == {"longer than max_length (truncate_left)": 3}
    else:
        assert len(documents) == 7
        assert report.dropped == {"longer than max_length (truncate_right)": 3, "without a supervised token": 3}
        assert report.named["without a supervised token"] == ["chats.jsonl:3", "chats.jsonl:6", "chats.jsonl:10"]
    assert report.lost_tokens == 3 * (length(LONG) - LIMIT)


def test_truncating_on_the_left_keeps_bos() -> None:
    """Otherwise the row would begin as no text ever does."""
    tokenizer = family("llama3")
    limit = length(LONG, tokenizer) - 9
    documents, _ = encoded("truncate_left", tokenizer, limit)
    ids, labels = pieces(documents)[2]
    assert len(ids) == len(labels) == limit and ids[0] == tokenizer.bos_token_id and labels[0] == IGNORED
    assert tokenizer.decode(ids[-1:]) == "<|eot_id|>" == tokenizer.decode(labels[-1:])


@given(limit=st.integers(2, 60), question=st.text("ab \n", max_size=60), answer=st.text("cd \n", max_size=200))
@settings(max_examples=50, deadline=None)
def test_overlength_split_keeps_every_label(limit: int, question: str, answer: str) -> None:
    """Each supervised token is predicted exactly once, from the token before it, as in the whole conversation."""
    rows = chats([(question, answer)])
    ids, labels = pieces(encode_conversations(rows, TOKENIZER, Report()))[0]
    wanted = [(ids[at - 1], label) for at, label in enumerate(labels) if label != IGNORED]
    report = Report()
    documents = encode_conversations(rows, TOKENIZER, report, max_length=limit, overlength="split")
    assert documents.lengths.max() <= limit
    found = [(i[at - 1], label) for i, own in pieces(documents) for at, label in enumerate(own) if label != IGNORED]
    assert found == wanted
    assert sum(label != IGNORED for _, own in pieces(documents) for label in own) == len(wanted)


def test_rows_without_a_label_fail_above_the_threshold() -> None:
    """Eight rows whose long question is cut off, three of eight, none."""
    cut = chats([LONG] * 8)
    with pytest.raises(DataError, match=r"8 of 8 rows have no supervised token: chats.jsonl:1, .*, chats.jsonl:8"):
        encode_conversations(cut, TOKENIZER, Report(), max_length=8, overlength="truncate_right")
    some = chats([LONG if at < 3 else SHORT for at in range(8)])
    options: dict[str, Any] = {"max_length": length(SHORT), "overlength": "truncate_right"}
    with pytest.raises(DataError, match="3 of 8 rows have no supervised token"):
        encode_conversations(some, TOKENIZER, Report(), **options, max_unsupervised=0.3)
    report = Report()
    documents = encode_conversations(some, TOKENIZER, report, **options, max_unsupervised=0.4)
    assert pieces(documents) == pieces(encode_conversations(chats([SHORT] * 5), TOKENIZER, Report()))
    assert report.dropped["without a supervised token"] == 3


def test_nothing_left_is_an_error() -> None:
    """Whatever is allowed."""
    with pytest.raises(DataError, match="none of the 2 rows is left"):
        encode_conversations(chats([LONG] * 2), TOKENIZER, Report(), max_length=5, overlength="drop")


def test_the_end_is_learnt_where_it_is_the_padding_too() -> None:
    """Pad equals EOS in this tokenizer (A7)."""
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    ids, labels = pieces(encode_conversations(chats([SHORT]), TOKENIZER, Report()))[0]
    at = len(ids) - 2  # a line end follows
    assert ids[at] == labels[at] == TOKENIZER.eos_token_id


def test_mask_inputs_off_learns_everything() -> None:
    """Labels are the ids."""
    ids, labels = pieces(encode_conversations(chats([SHORT]), TOKENIZER, Report(), mask_inputs=False))[0]
    assert ids == labels


def test_rows_that_are_tokens_already() -> None:
    """They stand in their place among conversations, and follow the same policies."""
    import pyarrow as pa

    given_ids = pa.array([None, [5, 6, 7], None, list(range(99))], type=pa.list_(pa.int64()))
    labels = pa.array([None, [IGNORED, 6, 7], None, list(range(99))], type=pa.list_(pa.int64()))
    rows = chats([SHORT] * 4, input_ids=given_ids, labels=labels)
    report = Report()
    found = pieces(encode_conversations(rows, TOKENIZER, report, max_length=50, overlength="drop"))
    one = pieces(encode_conversations(chats([SHORT]), TOKENIZER, Report()))[0]
    assert found == [one, ([5, 6, 7], [IGNORED, 6, 7]), one]
    assert report.named == {"longer than max_length (drop)": ["chats.jsonl:4"]}
    bad = chats([SHORT], input_ids=pa.array([[1, 2]]), labels=pa.array([[1]]))
    for ids, learnt, field in (
        ([1, 2**40], [1, 2], "input_ids"),
        ([-1], [1], "input_ids"),
        ([1, 2], [-1, 2], "labels"),
    ):
        wrong = chats([SHORT], input_ids=pa.array([ids]), labels=pa.array([learnt]))
        with pytest.raises(DataError, match=rf"chats.jsonl:1: `{field}` holds "):
            encode_conversations(wrong, TOKENIZER, Report())
    with pytest.raises(DataError, match=r"chats.jsonl:1: there are 2 `input_ids`, but 1 `labels`"):
        encode_conversations(bad, TOKENIZER, Report())


def test_rows_that_a_callback_made() -> None:
    """Plain lists of messages, without names: rows are counted from 1, errors name them."""
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 2
    plain = encode_conversations(Dataset.from_dict({"messages": messages}), TOKENIZER, Report())
    assert pieces(plain) == pieces(encode_conversations(chats([("a", "b")] * 2), TOKENIZER, Report()))
    messages = [messages[0], [{"role": "human", "content": "a"}]]
    with pytest.raises(DataError, match=r'row 2: `messages\[0\].role` is "human"'):
        encode_conversations(Dataset.from_dict({"messages": messages}), TOKENIZER, Report())


def test_what_can_not_be_rendered_is_named() -> None:
    """Row, reason, way out."""
    rows = Dataset.from_dict({"messages": [[{"role": "system", "content": "a"}]], "origin": ["x.jsonl:7"]})
    with pytest.raises(DataError, match=r"x.jsonl:7: the chat template can't render it: System role not supported"):
        encode_conversations(rows, family("gemma"), Report())
    said = [("user", "a"), ("system", "a"), ("human", "a")]
    rows = Dataset.from_dict({"messages": [[{"role": role, "content": text}] for role, text in said]})
    with pytest.raises(DataError, match=r"row 2: the chat template can't render it: System role not supported"):
        encode_conversations(rows, family("gemma"), Report())
    with pytest.raises(DataError, match="no column `messages`"):
        encode_conversations(Dataset.from_dict({"a": [1]}), TOKENIZER, Report())
    with pytest.raises(DataError, match="no column `text`"):
        encode_texts(Dataset.from_dict({"a": [1]}), TOKENIZER, Report())


def test_texts_have_both_ends() -> None:
    """BOS and EOS where there are any; every token is a label."""
    tokenizer = family("llama3")
    found = pieces(encode_texts(Dataset.from_dict({"text": ["one two", "drei"]}), tokenizer, Report()))
    for (ids, labels), text in zip(found, ["one two", "drei"], strict=True):
        assert ids == labels and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:-1]) == text
    with pytest.raises(DataError, match=r"row 1: `text` is None"):
        encode_texts(Dataset.from_dict({"text": [None]}), tokenizer, Report())


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_does_not_matter(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same documents, counts and files, over several shards; the first is made before processes start."""
    monkeypatch.setattr(shards, "START_SECONDS", 0.0)
    asked: list[range] = []
    run = processes_module.in_processes
    monkeypatch.setattr(
        processes_module, "in_processes", lambda task, numbers, n: asked.append(numbers) or run(task, numbers, n)
    )
    rows = chats([("q" * (at % 7), f"answer {at} " * (1 + at % 11)) for at in range(2300)])
    found = []
    for count in (1, processes):
        folder = tmp_path / str(count)
        folder.mkdir()
        report = Report()
        with using(Workspace(folder, num_proc=count)):
            encode_conversations(rows, TOKENIZER, report, max_length=60, overlength="drop")
        files = {file.name: file.read_bytes() for file in (folder / "shards").iterdir()}
        found.append((files, report))
    assert len(found[0][0]) == 3 and found[0] == found[1] and asked == [range(1, 3)]


def test_no_process_is_started_for_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take longer to start than all of the work."""
    monkeypatch.delattr(processes_module, "in_processes")
    with using(Workspace(tmp_path, num_proc=8)):
        encode_conversations(chats([SHORT] * 1100), TOKENIZER, Report())


def test_errors_of_processes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is named, and no process is left behind."""
    monkeypatch.setattr(shards, "START_SECONDS", 0.0)
    rows = chats([SHORT] * 1500)
    said = [*rows["messages"][:1400], [{"role": "tool", "content": "x"}], *rows["messages"][1401:]]
    with using(Workspace(tmp_path, num_proc=2)), pytest.raises(DataError, match=r"row 1401: the chat template leaves"):
        encode_conversations(Dataset.from_dict({"messages": said}), family("phi3"), Report())


def test_counts_of_the_result() -> None:
    """Samples, tokens and labels of packed rows, by hand."""
    report = Report()
    documents = encode_conversations(chats([SHORT] * 3), TOKENIZER, report)
    rows = counted(documents.rows(documents.bins([[0, 2], [1]]), "x"), report, 40)
    one = pieces(documents)[0]
    labels = sum(label != IGNORED for label in one[1])
    assert rows["document_lengths"] == [[len(one[0])] * 2, [len(one[0])]]
    assert rows["input_ids"][0] == one[0] * 2 and rows["labels"][0] == one[1] * 2
    assert (report.samples, report.tokens, report.supervised_tokens) == (2, 3 * len(one[0]), 3 * labels)
    assert report.fullness == pytest.approx(3 * len(one[0]) / 80)
    assert np.array_equal(documents.lengths, [len(one[0])] * 3)


def test_a_process_that_dies_is_said(tmp_path: Path) -> None:
    """Instead of waiting for it."""
    task = {"rows": str(tmp_path / "none"), "tokenizer": str(tmp_path), "folder": str(tmp_path), "job": {}}
    with pytest.raises(PtrainError, match="a process that prepares data died with exit code 1"):
        list(processes_module.in_processes(task, range(3), 2))


def test_what_a_template_does_not_write_is_noted() -> None:
    """Tool schemas that nobody sees, a date that changes."""
    import json

    rows = chats([SHORT], tools=[json.dumps([{"name": "f"}])])
    report = Report()
    encode_conversations(rows, TOKENIZER, report)
    assert report.notes == ["the chat template leaves the column `tools` out"] and report.lines()[-1] == report.notes[0]
    assert "strftime_now" not in TOKENIZER.chat_template
