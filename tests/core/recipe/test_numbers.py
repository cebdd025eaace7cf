"""Numbers as people write them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain.recipe.numbers import SUFFIXES, parse_number

pytestmark = pytest.mark.torch_free


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("200k", 200_000),
        ("1.5M", 1_500_000),
        ("2b", 2 * 10**9),
        ("0.001T", 10**9),
        ("2_000", 2000),
        ("128ki", 131_072),
        ("1Mi", 2**20),
        ("1.5gi", 3 * 2**29),
        ("1ti", 2**40),
        ("2^20", 2**20),
        ("1e3", 1000),
        ("1.25e2", 125),
        ("-3", -3),
        ("+7", 7),
        (" 8 ", 8),
        ("5.", 5),
        ("8 k", 8000),
        ("300%", 3),
        ("1_0.5_0k", 10_500),
    ],
)
def test_whole_numbers(text: str, value: int) -> None:
    assert parse_number(text, integral=True) == value
    assert type(parse_number(text, integral=True)) is int
    assert type(parse_number(text, integral=False)) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.25e-4", 1.25e-4),
        ("10%", 0.1),
        (".5", 0.5),
        ("2^-2", 0.25),
        ("1.00001k", 1000.01),
        ("1e-5", 1e-5),
        ("0.1k", 100.0),
    ],
)
def test_fractions(text: str, value: float) -> None:
    assert parse_number(text, integral=False) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "k",
        "abc",
        "1__0",
        "_1",
        "1_",
        "1.2.3",
        "1,5",
        "--1",
        "1e",
        "1e5k",
        "0x10",
        "1e99999",
        "inf",
        "nan",
        "1" * 99,
        "2^",
        "^2",
        "2^99999",
        "0^-1",
        "1 2",
        "½",
        "٣",
        "1kk",
        "1kib",
        "1e400",
        "-2^9999",
    ],
)
def test_no_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=r"number is expected|too large"):
        parse_number(text, integral=False)


@pytest.mark.parametrize("text", ["1.00001k", "0.5", "1e-5", "10%", "2^-1", "1.5"])
def test_what_is_not_whole(text: str) -> None:
    with pytest.raises(ValueError, match="whole number is expected, but"):
        parse_number(text, integral=True)


@given(st.integers(-(10**30), 10**30), st.sampled_from(sorted(set(SUFFIXES) - {"%"})), st.booleans())
def test_whole_times_suffix_is_exact(number: int, suffix: str, upper: bool) -> None:
    written = f"{number:_}{suffix.upper() if upper else suffix}"
    assert parse_number(written, integral=True) == number * SUFFIXES[suffix]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_reads_back(number: float) -> None:
    assert parse_number(repr(number), integral=False) == number


@given(st.decimals(-1000, 1000, places=6, allow_nan=False), st.sampled_from(sorted(SUFFIXES)))
def test_rounded_once(number: object, suffix: str) -> None:
    exact = Fraction(str(number)) * SUFFIXES[suffix]
    assert parse_number(f"{number:f}{suffix}", integral=False) == float(exact)
    if exact.denominator == 1:
        assert parse_number(f"{number:f}{suffix}", integral=True) == exact
    else:
        with pytest.raises(ValueError, match="whole"):
            parse_number(f"{number:f}{suffix}", integral=True)


@given(st.text(max_size=80))
def test_any_text_is_a_number_or_a_value_error(text: str) -> None:
    for integral in (True, False):
        try:
            assert isinstance(parse_number(text, integral=integral), int if integral else float)
        except ValueError as error:
            assert str(error)
