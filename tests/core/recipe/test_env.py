"""`${env:NAME}`: kept in the recipe, replaced in a copy just before a part is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptrain.errors import RecipeError
from ptrain.recipe.config import Config
from ptrain.recipe.dump import dump, result_hash
from ptrain.recipe.env import references, resolve
from ptrain.recipe.load import Loaded

pytestmark = pytest.mark.torch_free

SECRET = "canary-5f1e"


class Inner(Config):
    token: str = ""


class Example(Config):
    text: str = ""
    path: Path = Path()
    many: list[str] = []
    free: dict[str, Any] = {}
    inner: Inner = Inner()
    number: int = 3


def test_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    given = Example.model_validate(
        {
            "text": "a-${env:MY_TOKEN}-${env:MY_TOKEN}",
            "path": "/d/${env:MY_TOKEN}/f",
            "many": ["x", "${env:MY_TOKEN}"],
            "free": {"a": [{"b": "${env:MY_TOKEN}"}, 3]},
            "inner": {"token": "${env:MY_TOKEN}"},
        }
    )
    made = resolve(given)
    assert made.text == f"a-{SECRET}-{SECRET}"
    assert made.path == Path("/d") / SECRET / "f"
    assert made.many == ["x", SECRET]
    assert made.free == {"a": [{"b": SECRET}, 3]}
    assert made.inner.token == SECRET
    assert made.model_fields_set == given.model_fields_set
    assert SECRET not in given.model_dump_json()


def test_without_references_nothing_is_copied() -> None:
    given = Example(text="$env:A ${env:1} ${HOME}", many=["x"])
    assert resolve(given) is given


def test_an_unset_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(RecipeError, match=r"`free.a.0` refers to the environment variable `NOT_SET`, which is not set"):
        resolve(Example(free={"a": ["${env:NOT_SET}"]}))


def test_references() -> None:
    data = {"a": ["${env:X}", {"b": "${env:Y}${env:Z}"}], "c": 3}
    assert list(references(data)) == [(("a", 0), "X"), (("a", 1, "b"), "Y"), (("a", 1, "b"), "Z")]


def test_never_dumped(load: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    loaded = load("type: tiny\nmodel: {name_or_path: '${env:MY_TOKEN}'}\ndata: {sources: ['${env:MY_TOKEN}']}\n")
    assert loaded.warnings == []
    assert resolve(loaded.recipe.model).name_or_path == SECRET
    for whole in (True, False):
        assert SECRET not in json.dumps(dump(loaded.recipe, defaults=whole))
        assert "${env:MY_TOKEN}" in json.dumps(dump(loaded.recipe, defaults=whole))
    before = result_hash(loaded.recipe)
    monkeypatch.setenv("MY_TOKEN", "other")
    assert result_hash(loaded.recipe) == before


def test_only_text_may_hold_one(problems: Callable[..., list[str]]) -> None:
    (found,) = problems("type: tiny\nmodel: {}\ndata: {sources: [a]}\nseed: '${env:SEED}'\n")
    assert found.startswith("4:7 `seed`: an environment reference stands only for text")
