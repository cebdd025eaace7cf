"""YAML 1.2 with positions; every fault of the text names file, line and column."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ptrain.errors import Position, RecipeError
from ptrain.recipe.document import from_mapping
from ptrain.recipe.tree import read, read_file, read_value
from ptrain.recipe.yaml12 import write

pytestmark = pytest.mark.torch_free


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("+3", 3),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("2_000", "2_000"),
        ("1:30", "1:30"),
        ("0b11", "0b11"),
        ("true", True),
        ("FALSE", False),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("tRUE", "tRUE"),
        ("null", None),
        ("~", None),
        ("", None),
        ("Null", None),
        ("none", "none"),
        ("2024-01-01", "2024-01-01"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        (r'"\ud83d\ude00"', "\U0001f600"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_core_schema(text: str, value: object) -> None:
    found = read(f"a: {text}\n").data["a"]
    assert (found, type(found)) == (value, type(value))


def test_nan() -> None:
    assert math.isnan(read("a: .nan").data["a"])


def test_positions() -> None:
    document = read("# note\na: 1\nb:\n  - c: x\n    d: [1, 2]\n  - y\n", "r.yaml")
    assert document.data == {"a": 1, "b": [{"c": "x", "d": [1, 2]}, "y"]}
    assert document.keys[("a",)] == Position("r.yaml", 2, 1)
    assert document.values[("a",)] == Position("r.yaml", 2, 4)
    assert document.keys[("b", 0, "d")] == Position("r.yaml", 5, 5)
    assert document.values[("b", 0, "d", 1)] == Position("r.yaml", 5, 12)
    assert document.keys[("b", 1)] == Position("r.yaml", 6, 5)
    assert document.position(("b", 0, "e", "f")) == document.keys[("b", 0)]
    assert document.position(("z",)) == Position("r.yaml")


def test_anchors_and_merge_keys() -> None:
    text = "x-base: &base {lr: 1, betas: [0.9, 0.99]}\na:\n  <<: *base\n  lr: 2\nb: *base\n"
    text += "c:\n  <<: [*base, {lr: 5, eps: 3}]\n"
    document = read(text)
    assert document.data["a"] == {"lr": 2, "betas": [0.9, 0.99]}
    assert document.data["b"] == {"lr": 1, "betas": [0.9, 0.99]}
    assert document.data["c"] == {"lr": 1, "betas": [0.9, 0.99], "eps": 3}
    assert document.keys[("a", "lr")].line == 4
    assert document.values[("a", "betas", 1)] == Position("recipe", 1, 36)
    assert document.keys[("c", "eps")].line == 7


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", (3, 1), "`a` is given twice, lines 1 and 3"),
        ("{a: 1, a: 2}", (1, 8), "`a` is given twice, on line 1"),
        ("a:\n  b:\n    c: 1\n    c: 2\n", (4, 5), "`c` is given twice, lines 3 and 4"),
        ("a:\n\t- b\n", (2, 1), "a tab stands in the indentation"),
        ("a:\n  b: 1\n\tc: 2\n", (3, 1), "a tab stands in the indentation"),
        ("", (0, 0), "the recipe is empty"),
        ("# only a note\n", (0, 0), "the recipe is empty"),
        ("- a\n", (1, 1), "the recipe is a list"),
        ("\n\nhello\n", (3, 1), "the recipe is a single value"),
        ("a: [1, 2\nb: 3\n", (2, 2), "this is no YAML"),
        ("a: 'x\n", (2, 1), "this is no YAML"),
        ("a: b: c\n", (1, 5), "this is no YAML"),
        ("a: {", (1, 5), "<stream end>"),
        ("a: [1,\n\n", (3, 1), "<stream end>"),
        ("a: [1, }\n", (1, 8), "this is no YAML"),
        ("a:\n  - 1\n - 2\n", (3, 2), "this is no YAML"),
        ("a: @x\n", (1, 4), "this is no YAML"),
        ("a: 1\nb 2\nc: 3\n", (2, 1), "a key without a `:`"),
        ("a: *nowhere\n", (1, 4), "undefined alias"),
        ("a: &a [*a]\n", (1, 4), "this anchor contains itself"),
        ("a: &a {<<: *a}\n", (1, 4), "this anchor contains itself"),
        ("a: {<<: 3}\n", (1, 9), "`<<` takes a mapping"),
        ("a: 1\n---\nb: 2\n", (2, 1), "a second document begins here"),
        ("a: !!python/object:os.system x\n", (1, 4), "the tag `!!python/object:os.system` means nothing here"),
        ("a: !mine [1]\n", (1, 4), "the tag `!mine` means nothing here"),
        ("a: !!map [1]\n", (1, 4), "these are no keys with values"),
        ("a: !!seq {b: 1}\n", (1, 4), "this is no list"),
        ("a: !!int x\n", (1, 4), "'x' does not fit its tag `!!int`"),
        ("? [1, 2]\n: 3\n", (1, 3), "this is no key"),
        ("true: 3\n", (1, 1), "`true` is no key"),
        ("a: 1\nb: \x07\n", (2, 4), "the character U+0007 is not allowed in YAML"),
        ("a: " + "[" * 5000, (0, 0), "nested too deeply"),
        ('a: ["\\ud83d"]\n', (1, 5), "does not fit its tag `!!str`"),
        ("a: " + "1" * 5000, (1, 4), "does not fit its tag"),
    ],
)
def test_faults(text: str, place: tuple[int, int], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(text, "r.yaml")
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.where is not None
    assert (problem.where.file, problem.where.line, problem.where.column) == ("r.yaml", *place)


def test_all_double_keys_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        read("a: 1\na: 2\nb: {c: 1, c: 2}\n")
    assert [problem.where.line for problem in caught.value.problems if problem.where] == [2, 3]


def test_whole_numbers_as_keys_are_text() -> None:
    assert read("a: {0: x, 007: y}\n").data == {"a": {"0": "x", "007": "y"}}


def test_a_bomb_of_anchors() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(RecipeError, match="unfold to more than"):
        read("\n".join(lines))


def test_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        read_file(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        read_file(tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_bytes("a: 1\nb: é".encode() + b"\xff")
    with pytest.raises(RecipeError, match="0xff is not UTF-8") as caught:
        read_file(bad)
    assert caught.value.problems[0].where == Position(str(bad), 2, 5)
    bad.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_file(bad).data == {"a": 1, "b": 2}


def test_values_of_overrides() -> None:
    assert read_value("[a, 1e-5, {b: true}]", "-o x") == ["a", 1e-5, {"b": True}]
    assert read_value("", "-o x") is None
    assert read_value("2", "-o x") == 2
    for text in ("[1", "{a: 1, a: 2}", "a\tb: [", "\x00"):
        with pytest.raises(RecipeError) as caught:
            read_value(text, "-o x")
        assert caught.value.problems[0].where == Position("-o x")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=40), inner, max_size=4),
    max_leaves=12,
)


# A key of YAML is at most 1024 characters long.
names = st.text(min_size=1, max_size=40)


@given(st.dictionaries(names, plain, min_size=1, max_size=4))
def test_json_is_read_as_it_is(data: dict) -> None:
    # JSON is YAML 1.2; control characters can't stand in YAML, so they are left escaped.
    assert read(json.dumps(data)).data == data


@given(
    st.dictionaries(names, plain | st.sampled_from(["0E0", "on", "1_0", "0o7", "12:30", "~", "null", "="]), max_size=4)
)
def test_what_is_written_reads_back(data: dict) -> None:
    written = write(data)
    document = read(written) if data else from_mapping({})
    assert document.data == data
    assert yaml.safe_load(written) == data
    assert all(place in document.keys for place in document.values if place)


@given(st.text())
def test_any_text_is_a_document_or_a_recipe_error(text: str) -> None:
    try:
        assert isinstance(read(text).data, dict)
    except RecipeError as error:
        assert error.problems[0].where is not None
