"""Preference rows to token rows: every form that rows have, what is learnt, and what becomes of long ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain import DataError
from ptrain.job import prepare_data
from ptrain.recipe.load import load_recipe
from ptrain_dpo.data import DPOData, cut, pair

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "yes"), ("assistant", "no"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, {**GOOD, "name": None}], "rejected": [USER, BAD]},
    ],
)
def test_every_form_is_the_same_pair(row: dict[str, Any]) -> None:
    prompt, chosen, rejected = pair(row, "row 1")
    assert prompt == [USER]
    assert [one["content"] for one in (*chosen, *rejected)] == ["yes", "no"]


def test_what_both_conversations_begin_with_is_the_prompt() -> None:
    more = [USER, GOOD, {"role": "user", "content": "and?"}]
    prompt, chosen, rejected = pair({"chosen": [*more, GOOD], "rejected": [*more, BAD, USER, BAD]}, "row 1")
    assert prompt == more and chosen == [GOOD] and rejected == [BAD, USER, BAD]
    assert pair({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "row 1") == ([USER], [GOOD], [GOOD])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "chosen": "yes"}, "`rejected` is missing"),
        ({"prompt": "q", "chosen": "", "rejected": "no"}, "`chosen` is empty"),
        ({"chosen": "yes", "rejected": "no"}, "`prompt` is missing"),
        ({"prompt": "q", "chosen": [USER], "rejected": [BAD]}, "`chosen` begins with a message of the role `user`"),
        ({"chosen": [{"role": "system", "content": "s"}, GOOD], "rejected": [USER, BAD]}, "of the role `system`"),
        ({"chosen": [USER], "rejected": [USER]}, "of the role `user`"),
    ],
)
def test_rows_that_are_no_pairs(row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match="file:7") as error:
        pair(row, "file:7")
    assert told in str(error.value)


@given(
    prompt=st.integers(1, 60), answer=st.integers(1, 60), length=st.integers(2, 50), room=st.integers(1, 49),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)  # fmt: skip
def test_no_answer_is_cut_away(prompt: int, answer: int, length: int, room: int, mode: Any) -> None:
    """What is left fits, has a part of the prompt and of the answer, each from the end that it should be."""
    kept = min(room, length - 1)
    data = DPOData(
        type="dpo", sources=[{}], max_length=length, max_prompt_length=kept, dpo_prompt_truncation_mode=mode,
        overlength="truncate",
    )  # type: ignore[arg-type]  # fmt: skip
    ids = np.arange(prompt + answer, dtype=np.int32)
    labels = np.where(ids < prompt, -100, ids).astype(np.int32)
    found, learnt = cut((ids, labels), data)
    before, after = found[learnt == -100], found[learnt != -100]
    assert len(found) <= length and len(before) == min(prompt, kept) and len(after) >= 1
    start = 0 if mode == "keep_start" else prompt - len(before)
    assert before.tolist() == list(range(start, start + len(before)))
    assert after.tolist() == list(range(prompt, prompt + min(answer, length - len(before))))


def prepared(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> Any:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "type": "dpo", "model": {"config": {"model_type": "llama", "vocab_size": 300}},
        "tokenizer": {"type": "train", "vocab_size": 300, "chat_template": "chatml"},
        "data": {"sources": [{"type": "jsonl", "path": str(path)}], "cache_dir": str(tmp_path / "cache"), **data},
    }  # fmt: skip
    run, found = prepare_data(load_recipe(recipe), tmp_path / "run")
    return run, found


def test_a_pair_is_a_row_of_two_conversations(tmp_path: Path) -> None:
    """With what the template makes of each, and the assistant's words of the answers as labels."""
    first = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}, USER]
    run, found = prepared(
        tmp_path,
        [
            {"prompt": first, "chosen": [GOOD], "rejected": [BAD]},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]},
        ],
    )
    assert found.report["train"]["rows"] == 2 and len(found.train) == 1
    assert found.report["train"]["dropped"] == {"with the same answer as chosen and rejected": 1}
    row = found.train[0]
    half = row["document_lengths"][0]
    for answer, part in ((GOOD, slice(0, half)), (BAD, slice(half, None))):
        ids, labels = row["input_ids"][part], row["labels"][part]
        text = run.tokenizer.apply_chat_template([*first, answer], tokenize=False)
        assert run.tokenizer.decode(ids) == text
        assert run.tokenizer.decode([label for label in labels if label != -100]) == f"{answer['content']}<|im_end|>"


LONG = {"prompt": "one two three four five six seven eight nine ten " * 4, "chosen": "yes", "rejected": "no no no"}


def test_long_pairs_are_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 2 pairs are longer than") as error:
        prepared(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}, LONG], max_length=64)
    assert "pairs.jsonl:2" in str(error.value)


@pytest.mark.parametrize(("policy", "left"), [("drop", 1), ("truncate", 2)])
def test_long_pairs_are_left_out_or_cut(tmp_path: Path, policy: str, left: int) -> None:
    run, found = prepared(
        tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}, LONG], max_length=64, overlength=policy
    )
    assert len(found.train) == left and max(map(len, found.train["input_ids"])) <= run.recipe.data.longest_row == 128
    for row in found.train:
        first, second = row["document_lengths"]
        assert max(first, second) <= 64
        labels = np.array(row["labels"])
        assert (labels[:first] != -100).any() and (labels[first:] != -100).any()
    assert found.report["train"]["dropped"] == {f"longer than max_length ({policy})": 1}
