"""`-o key=value` on a recipe as it is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain.errors import RecipeError
from ptrain.recipe.document import from_mapping
from ptrain.recipe.overrides import apply, is_override
from ptrain.recipe.tree import read

pytestmark = pytest.mark.torch_free

RECIPE = "a: 1\nb: {c: 2}\nd:\n  - x\n  - {e: 3}\nn:\n"


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("a=5", ("a",), 5),
        ("b.c=1e-5", ("b", "c"), 1e-5),
        ("b.z=on", ("b", "z"), "on"),
        ("q.r.s=true", ("q", "r", "s"), True),
        ("d.0=y", ("d", 0), "y"),
        ("d.1.e=null", ("d", 1, "e"), None),
        ("d.2=new", ("d", 2), "new"),
        ("d.2.path=p", ("d", 2, "path"), "p"),
        ("n.m=1", ("n", "m"), 1),
        ("w.0.v=1", ("w", 0, "v"), 1),
        ("d=[a, {b: c}]", ("d", 1, "b"), "c"),
        ("a=x=y", ("a",), "x=y"),
        ("b={}", ("b",), {}),
        (" a =5", ("a",), 5),
        ("a=", ("a",), None),
    ],
)
def test_sets(override: str, place: tuple, value: object) -> None:
    document = read(RECIPE)
    apply(document, [override])
    found: object = document.data
    for step in place:
        found = found[step]  # type: ignore[index]
    assert found == value
    assert document.position(place).file == f"-o {override}"
    assert is_override(document.value_position(place))


def test_leaves_the_rest_alone() -> None:
    document = read(RECIPE)
    apply(document, ["b.z=1"])
    assert document.data == {**read(RECIPE).data, "b": {"c": 2, "z": 1}}
    assert document.keys[("b", "c")].line == 2
    assert not is_override(document.position(("b", "c")))
    assert not is_override(document.position(("b",)))


def test_in_order() -> None:
    document = from_mapping({})
    apply(document, ["a.b=1", "a.b=2", "a={c: 3}", "a.d=4"])
    assert document.data == {"a": {"c": 3, "d": 4}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "has no `=`"),
        ("=3", "has no key"),
        ("a..b=3", "has no key"),
        (".=3", "has no key"),
        ("d.5=1", "`d` is a list of 2: it has no entry `5`"),
        ("d.-1=1", "no entry `-1`"),
        ("d.x=1", "no entry `x`"),
        ("d.3.x=1", "no entry `3`"),
        ("a.b=1", "`a` is the single value `1`: it has no key `b`"),
        ("d.0.x.y=1", "`d.0` is the single value `x`"),
        ("a=[1", "no YAML"),
        ("a={b: 1, b: 2}", "given twice"),
    ],
)
def test_malformed(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match="1 problem|" + message.replace("`", ".")) as caught:
        apply(read(RECIPE), [override])
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.where is not None
    assert problem.where.file == f"-o {override}"


def test_all_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        apply(read(RECIPE), ["a", "a.b=1", "a=7"])
    assert len(caught.value.problems) == 2


@given(st.lists(st.text("abc01", min_size=1), min_size=1, max_size=4), st.integers())
def test_what_was_set_is_there(path: list[str], value: int) -> None:
    document = from_mapping({})
    try:
        apply(document, [f"{'.'.join(path)}={value}"])
    except RecipeError as error:
        assert "list of 0" in str(error)
        return
    found: object = document.data
    for step in path:
        found = found[int(step) if isinstance(found, list) else step]  # type: ignore[index]
    assert found == value
