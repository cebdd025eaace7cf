"""What a misspelt name was meant to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain.recipe.suggest import closest, distance

pytestmark = pytest.mark.torch_free

words = st.text("abcd_", max_size=8)


@pytest.mark.parametrize(
    ("left", "right", "off"),
    [
        ("", "", 0),
        ("a", "", 1),
        ("abc", "abc", 0),
        ("abc", "acb", 1),
        ("abc", "abcd", 1),
        ("abc", "xbc", 1),
        ("ca", "abc", 3),
        ("kitten", "sitting", 3),
    ],
)
def test_distance(left: str, right: str, off: int) -> None:
    assert distance(left, right) == off


@given(words, words)
def test_distance_is_symmetric_and_bounded(left: str, right: str) -> None:
    assert distance(left, right) == distance(right, left)
    assert abs(len(left) - len(right)) <= distance(left, right) <= max(len(left), len(right))
    assert (distance(left, right) == 0) == (left == right)


@given(words, st.integers(0, 8), st.sampled_from("abcd_"))
def test_one_change_is_one(word: str, at: int, letter: str) -> None:
    at = min(at, len(word))
    assert distance(word, word[:at] + letter + word[at:]) == 1
    if at < len(word):
        assert distance(word, word[:at] + word[at + 1 :]) == 1
    if at + 1 < len(word) and word[at] != word[at + 1]:
        assert distance(word, word[:at] + word[at + 1] + word[at] + word[at + 2 :]) == 1


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("lrr", ["lr", "betas"], "lr"),
        ("learnig_rate", ["lr", "learning_rate"], "learning_rate"),
        ("Max-Length", ["max_length"], "max_length"),
        ("xyz", ["lr", "betas"], None),
        ("tdype", ["type", "dtype"], "dtype"),
        ("mode", ["code", "model"], "model"),
        ("zero_optimisation", ["zero_optimization"], "zero_optimization"),
        ("sead", ["seed"], "seed"),
        ("warn", ["DEBUG", "WARNING"], "WARNING"),
        ("save_every", ["save_every_n_steps", "save_every_n_epochs"], None),
        ("wa", ["DEBUG", "WARNING"], None),
        ("sxxd", ["seed"], None),
        ("save_n_steps", ["save_every_n_steps", "save_every_n_epochs"], None),
        ("", ["a"], "a"),
    ],
)
def test_closest(name: str, known: list[str], meant: str | None) -> None:
    assert closest(name, known) == meant
