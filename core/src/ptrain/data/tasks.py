"""Small generated question/answer tasks: arithmetic, dates and edits of spelled words.

Each task is a finite list of questions with one right answer each. A hash of the question alone decides
whether it is for training or for evaluation, so that no choice of seed or count can mix the two.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from functools import cache
from typing import Any, Literal, get_args

Part = Literal["train", "eval"]
Pair = tuple[str, str]
"""A question and its answer."""

_EVAL_SHARE = 10
"""One question in this many is for evaluation."""
_NUMBERS = range(10, 100)
_FIRST_DAY, _LAST_DAY = date(2000, 1, 1), date(2039, 12, 31)
# Names are spelled out here because those of `strftime` change with the locale.
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_VOWELS = "aeiou"
_CONSONANTS = "bdgklmnprst"


# Sums and differences are answered with the step between: a small model learns those within minutes, while
# for results alone it takes many times as long, and how long is a matter of luck.
def _add() -> Iterator[Pair]:
    for a, b in itertools.product(_NUMBERS, repeat=2):
        tens, units = 10 * (a // 10 + b // 10), a % 10 + b % 10
        yield f"What is {a} + {b}?", f"{tens} + {units} = {a + b}"


def _subtract() -> Iterator[Pair]:
    for a, b in itertools.product(_NUMBERS, repeat=2):
        if a - b in _NUMBERS:
            tens, units = 10 * (a // 10 - b // 10), a % 10 - b % 10
            yield f"What is {a} - {b}?", f"{tens} {'-' if units < 0 else '+'} {abs(units)} = {a - b}"


def _larger() -> Iterator[Pair]:
    for a, b in itertools.permutations(_NUMBERS, 2):
        yield f"Which is larger, {a} or {b}?", str(max(a, b))


def _in_words(day: date) -> str:
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def _days() -> Iterator[date]:
    for offset in range((_LAST_DAY - _FIRST_DAY).days + 1):
        yield _FIRST_DAY + timedelta(days=offset)


def _next_date() -> Iterator[Pair]:
    for day in _days():
        yield f"What date comes after {_in_words(day)}?", _in_words(day + timedelta(days=1))


def _iso_date() -> Iterator[Pair]:
    for day in _days():
        yield f"Write {_in_words(day)} in digits.", day.isoformat()


def _month() -> Iterator[Pair]:
    for year, month, later in itertools.product(range(2000, 2040), range(12), range(2, 12)):
        years, index = divmod(month + later, 12)
        answer = f"{_MONTHS[index]} {year + years}"
        yield f"What month is {later} months after {_MONTHS[month]} {year}?", answer


def _words() -> Iterator[str]:
    """Every made-up word of three to five letters in which consonants and vowels take turns."""
    for length in (3, 4, 5):
        for letters in itertools.product(*itertools.islice(itertools.cycle((_CONSONANTS, _VOWELS)), length)):
            yield "".join(letters)


def _edit(ask: str, answer: Callable[[str], str]) -> Iterator[Pair]:
    """Questions about words that are spelled (`k a t o`), so that each letter is a token of its own."""
    for word in _words():
        yield ask.format(" ".join(word)), " ".join(answer(word))


def _capitals() -> Iterator[Pair]:
    return _edit("Write {} in capitals.", str.upper)


def _reverse() -> Iterator[Pair]:
    return _edit("Spell {} backwards.", lambda word: word[::-1])


def _remove_vowels() -> Iterator[Pair]:
    return _edit("Remove the vowels from {}.", lambda word: "".join(c for c in word if c not in _VOWELS))


_TASKS: dict[str, Callable[[], Iterator[Pair]]] = {
    "add": _add,
    "subtract": _subtract,
    "larger": _larger,
    "next_date": _next_date,
    "iso_date": _iso_date,
    "month": _month,
    "capitals": _capitals,
    "reverse": _reverse,
    "remove_vowels": _remove_vowels,
}


def task_names() -> list[str]:
    """The names of all tasks: arithmetic first, then dates, then edits of words."""
    return list(_TASKS)


def generate(tasks: Sequence[str], count: int, seed: int, part: Part) -> Iterator[dict[str, Any]]:
    """`count` rows of `tasks` in turn: `{"messages": [question, answer], "task": name}`.

    The rows depend on the arguments alone, and a smaller `count` gives the first of the same rows. Training
    questions are all asked once before one is repeated; evaluation questions are never repeated.

    Raises:
        ValueError: at once, for a task that is unknown or given twice, no tasks, a negative count, an
            unknown part, or more evaluation questions than there are.
    """
    names = list(tasks)
    _check(names, count, part)
    if part == "eval":
        _check_eval_count(names, count)
    return _rows(names, count, seed, part)


def _rows(names: list[str], count: int, seed: int, part: Part) -> Iterator[dict[str, Any]]:
    streams = [_shuffled(_split(name)[part], f"{seed}/{part}/{name}") for name in names]
    for index in range(count):
        turn = index % len(names)
        question, answer = next(streams[turn])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "task": names[turn]}


def _shuffled(pairs: Sequence[Pair], seed: str) -> Iterator[Pair]:
    """`pairs` in a new random order each time around, without end."""
    # Python promises the same `random()` for a seed in every version, but not the same `shuffle()`. Swapping
    # one by one also costs no more than the rows that are taken.
    draw = random.Random(seed)
    order = list(pairs)
    while True:
        for index in range(len(order)):
            other = index + int(draw.random() * (len(order) - index))
            order[index], order[other] = order[other], order[index]
            yield order[index]


@cache
def _split(name: str) -> dict[Part, tuple[Pair, ...]]:
    """The questions of a task by part."""
    split: dict[Part, list[Pair]] = {"train": [], "eval": []}
    for pair in _TASKS[name]():
        split[_part_of(pair[0])].append(pair)
    return {part: tuple(pairs) for part, pairs in split.items()}


def _part_of(question: str) -> Part:
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % _EVAL_SHARE == 0 else "train"


def _check(names: list[str], count: int, part: str) -> None:
    if not names:
        raise ValueError(f"no tasks given; known are {', '.join(_TASKS)}")
    for position, name in enumerate(names):
        if name not in _TASKS:
            close = difflib.get_close_matches(name, _TASKS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown task {name!r}{hint} (known are {', '.join(_TASKS)})")
        if name in names[:position]:
            raise ValueError(f"task {name!r} is given twice")
    if count < 0:
        raise ValueError(f"count is {count}, but can't be negative")
    if part not in get_args(Part):
        raise ValueError(f"unknown part {part!r}; it is one of {', '.join(get_args(Part))}")


def _check_eval_count(names: list[str], count: int) -> None:
    """Raise if a task runs out of distinct questions before `count` rows are made."""
    sizes = [len(_split(name)["eval"]) for name in names]
    # Taking turns, the task at `turn` is asked for its (size + 1)-th question in row size * tasks + turn.
    most, scarce = min((size * len(names) + turn, turn) for turn, size in enumerate(sizes))
    if count > most:
        raise ValueError(
            f"count is {count}, but these tasks give at most {most} distinct eval questions in turn: "
            f"{names[scarce]!r} has {sizes[scarce]} (all together: {sum(sizes)})"
        )
