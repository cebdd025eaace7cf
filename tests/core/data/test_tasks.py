"""The generated tasks: right answers, no leak from training to evaluation, rows that can be made again."""

from __future__ import annotations

import calendar
import operator
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptrain.data.tasks import Part, generate, task_names

pytestmark = pytest.mark.torch_free

NAMES = st.lists(st.sampled_from(task_names()), min_size=1, unique=True)
SEEDS = st.integers(min_value=0, max_value=2**64)
COUNTS = st.integers(min_value=0, max_value=300)
PARTS: st.SearchStrategy[Part] = st.sampled_from(["train", "eval"])
EVERYTHING = 60_000
"""More rows than any task has training questions."""


def rows(tasks: list[str], count: int, seed: int, part: Part) -> list[dict[str, Any]]:
    return list(generate(tasks, count, seed, part))


def question(row: dict[str, Any]) -> str:
    return row["messages"][0]["content"]


def questions(found: list[dict[str, Any]]) -> list[str]:
    return [question(row) for row in found]


def eval_size(task: str) -> int:
    """How many evaluation questions a task has, as its own error says."""
    with pytest.raises(ValueError) as caught:
        generate([task], 10**9, 0, "eval")
    return int(re.findall(r"at most (\d+)", str(caught.value))[0])


# One independent way to the answer per task: from the question's text alone.


def _arithmetic(text: str) -> str:
    left, sign, right = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", text).groups()
    work = {"+": operator.add, "-": operator.sub}[sign]
    tens, units = (work(*digits) for digits in zip(map(int, left), map(int, right), strict=True))
    return f"{tens * 10} {'-' if units < 0 else '+'} {abs(units)} = {work(int(left), int(right))}"


def _larger(text: str) -> str:
    return max(re.findall(r"\d+", text), key=int)


def _parse(text: str) -> datetime:
    return datetime.strptime(re.search(r"\d+ [A-Z][a-z]+ \d{4}", text)[0], "%d %B %Y")


def _next_date(text: str) -> str:
    day = _parse(text) + timedelta(days=1)
    return f"{day.day} {day.strftime('%B %Y')}"


def _month(text: str) -> str:
    later, month, year = re.fullmatch(r"What month is (\d+) months after (\w+) (\d+)\?", text).groups()
    number = list(calendar.month_name).index(month)
    for _ in range(int(later)):
        year, number = (int(year), number + 1) if number < 12 else (int(year) + 1, 1)
    return f"{calendar.month_name[number]} {year}"


def _letters(text: str) -> str:
    return "".join(re.findall(r"\b[a-z]\b", text))


def _spelled(word: str) -> str:
    return re.sub(r"(?<=.)(?=.)", " ", word)


ORACLES: dict[str, Callable[[str], str]] = {
    "add": _arithmetic,
    "subtract": _arithmetic,
    "larger": _larger,
    "next_date": _next_date,
    "iso_date": lambda text: _parse(text).strftime("%Y-%m-%d"),
    "month": _month,
    "capitals": lambda text: _spelled("".join(chr(ord(c) - 32) for c in _letters(text))),
    "reverse": lambda text: _spelled("".join(reversed(_letters(text)))),
    "remove_vowels": lambda text: _spelled(re.sub("[aeiou]", "", _letters(text))),
}


def test_every_task_has_an_oracle() -> None:
    assert task_names() == list(ORACLES)


@pytest.mark.parametrize("task", task_names())
def test_every_answer_is_right_and_no_question_is_in_both_parts(task: str) -> None:
    train, held_out = rows([task], EVERYTHING, 0, "train"), rows([task], eval_size(task), 0, "eval")
    for row in train + held_out:
        assert row["messages"][1]["content"] == ORACLES[task](question(row)), question(row)
    asked, kept = set(questions(train)), set(questions(held_out))
    assert not asked & kept
    assert len(kept) == len(held_out) >= 100
    assert 0.05 < len(kept) / len(asked | kept) < 0.15


def test_no_two_tasks_ask_the_same() -> None:
    count = len(task_names()) * 100
    asked = Counter(questions(rows(task_names(), count, 0, "eval")))
    assert set(asked.values()) == {1}


@given(NAMES, NAMES, COUNTS, COUNTS, SEEDS, SEEDS)
def test_eval_questions_never_appear_in_train(
    train_tasks: list[str], eval_tasks: list[str], n: int, m: int, seed: int, other: int
) -> None:
    held_out = questions(rows(eval_tasks, m, other, "eval"))
    assert not set(questions(rows(train_tasks, n, seed, "train"))) & set(held_out)
    assert len(set(held_out)) == m


@given(NAMES, COUNTS, COUNTS, SEEDS, PARTS)
def test_same_arguments_same_rows_and_a_smaller_count_is_a_prefix(
    tasks: list[str], n: int, m: int, seed: int, part: Part
) -> None:
    some = rows(tasks, n, seed, part)
    assert some == rows(tasks, n, seed, part)
    assert rows(tasks, min(n, m), seed, part) == some[:m]


@given(NAMES, COUNTS, SEEDS, PARTS)
def test_rows_have_the_promised_shape_and_tasks_take_turns(tasks: list[str], count: int, seed: int, part: Part) -> None:
    found = rows(tasks, count, seed, part)
    assert [row["task"] for row in found] == [tasks[i % len(tasks)] for i in range(count)]
    for row in found:
        assert set(row) == {"messages", "task"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(set(message) == {"role", "content"} for message in row["messages"])


@settings(max_examples=20)
@given(SEEDS)
def test_another_seed_gives_another_order(seed: int) -> None:
    assert rows(["add"], 50, seed, "train") != rows(["add"], 50, seed + 1, "train")


def test_rows_do_not_share_state() -> None:
    first = rows(["add"], 1, 0, "train")
    first[0]["messages"][0]["content"] = "changed"
    assert question(rows(["add"], 1, 0, "train")[0]) != "changed"


def test_rows_are_the_same_in_another_process_and_do_not_move_the_global_generator() -> None:
    code = "import sys; from ptrain.data.tasks import *; print(list(generate(task_names(), 90, 5, 'train')))"
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(rows(task_names(), 90, 5, "train"))


def test_rows_of_a_seed_stay_the_same_from_version_to_version() -> None:
    found = [(row["task"], question(row)) for row in generate(["add", "month", "reverse"], 3, 42, "train")]
    assert found == [
        ("add", "What is 45 + 84?"),
        ("month", "What month is 9 months after June 2026?"),
        ("reverse", "Spell g a p o g backwards."),
    ]


def test_train_asks_every_question_once_before_one_is_repeated() -> None:
    asked = questions(rows(["month"], 20_000, 0, "train"))
    distinct = len(set(asked))
    assert distinct < len(asked)
    assert len(set(asked[:distinct])) == distinct
    assert asked[:distinct] != asked[distinct : 2 * distinct]


@settings(max_examples=20, deadline=None)
@given(NAMES)
def test_eval_gives_exactly_as_many_questions_as_the_error_says(tasks: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        generate(tasks, 10**9, 0, "eval")
    most = int(re.findall(r"at most (\d+)", str(caught.value))[0])
    found = questions(rows(tasks, most, 0, "eval"))
    assert len(set(found)) == most
    with pytest.raises(ValueError, match=f"at most {most} distinct eval questions"):
        generate(tasks, most + 1, 0, "eval")
    assert min(eval_size(task) for task in tasks) * len(tasks) <= most


@pytest.mark.parametrize(
    ("tasks", "count", "part", "message"),
    [
        (["subtrct"], 1, "train", "unknown task 'subtrct'; did you mean 'subtract'"),
        (["zzzz"], 1, "eval", r"unknown task 'zzzz' \(known are add, subtract, .*remove_vowels\)"),
        (["add", "add"], 1, "train", "'add' is given twice"),
        ([], 1, "train", "no tasks given"),
        (["add"], -1, "train", "negative"),
        (["add"], 1, "test", "unknown part 'test'; it is one of train, eval"),
    ],
)
def test_wrong_arguments_are_refused_at_once(tasks: list[str], count: int, part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tasks, count, 0, part)
