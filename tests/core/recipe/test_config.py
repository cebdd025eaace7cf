"""How the values of a typed section are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from ptrain.recipe import sections
from ptrain.recipe.config import Config
from ptrain.recipe.describe import describe

pytestmark = pytest.mark.torch_free


class Inner(Config):
    size: int = 0


class Example(Config):
    aliases = {"no": "number"}

    number: int = 0
    share: float = 0.0
    flag: bool = False
    maybe: Annotated[int, Field(ge=1)] | None = None
    text: str = ""
    path: Path = Path()
    either: int | str = 0
    pair: tuple[float, float] = (0.0, 0.0)
    many: list[int] = []
    ranks: Literal["*"] | list[Annotated[int, Field(ge=0)]] = "*"
    mode: Literal["fast", "slow"] = "fast"
    free: dict[str, Any] = {}
    inner: Inner = Inner()
    level: Annotated[int, Field(gt=0, lt=9)] = 1
    full: Annotated[list[int], Field(min_length=1)] = [1]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("number", "200k", 200_000),
        ("number", 3.0, 3),
        ("number", "8", 8),
        ("share", "1.25e-4", 1.25e-4),
        ("share", 3, 3.0),
        ("maybe", "2_000", 2000),
        ("maybe", None, None),
        ("either", "200k", "200k"),
        ("pair", ["90%", "10%"], (0.9, 0.1)),
        ("many", ["1k", 2], [1000, 2]),
        ("ranks", ["0", 1], [0, 1]),
        ("ranks", "*", "*"),
        ("flag", True, True),
        ("free", {"a": "2k"}, {"a": "2k"}),
        ("inner", {"size": "1k"}, Inner(size=1000)),
        ("path", "a/b", Path("a/b")),
    ],
)
def test_reads(key: str, written: Any, value: Any) -> None:
    found = getattr(Example.model_validate({key: written}), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("number", True),
        ("number", "x"),
        ("number", 1.5),
        ("number", "1.5"),
        ("number", None),
        ("number", "${env:N}"),
        ("number", [1]),
        ("share", False),
        ("share", float("inf")),
        ("share", float("nan")),
        ("share", "nan"),
        ("flag", 1),
        ("flag", 0),
        ("flag", "true"),
        ("flag", "on"),
        ("flag", None),
        ("text", 3),
        ("text", True),
        ("maybe", 0),
        ("maybe", "0"),
        ("pair", [1]),
        ("pair", ["a", 1]),
        ("many", ["x"]),
        ("many", [True]),
        ("ranks", "all"),
        ("ranks", [-1]),
        ("mode", "medium"),
        ("inner", {"sice": 1}),
        ("inner", 3),
        ("other", 1),
        ("no_", 1),
        ("full", []),
    ],
)
def test_refuses(key: str, written: Any) -> None:
    with pytest.raises(ValidationError):
        Example.model_validate({key: written})


def test_aliases_and_notes() -> None:
    made = Example.model_validate({"no": 3, "x-why": "because", "inner": {"x-a": 1}})
    assert made == Example(number=3)
    assert made.model_fields_set == {"number", "inner"}
    with pytest.raises(ValidationError):
        Example.model_validate({"no": 3, "number": 3})


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Example().number = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", "a whole number"),
        ("share", "a number"),
        ("flag", "`true` or `false`"),
        ("maybe", "a whole number of at least 1"),
        ("text", "text"),
        ("path", "a path"),
        ("either", "a whole number or text"),
        ("pair", "a list of two, each a number"),
        ("many", "a list, each a whole number"),
        ("ranks", "`*` or a list, each a whole number of at least 0"),
        ("mode", "one of `fast`, `slow`"),
        ("free", "keys with values"),
        ("inner", "a section"),
        ("level", "a whole number of more than 0 and less than 9"),
        ("full", "a list, each a whole number; at least one"),
    ],
)
def test_words(name: str, words: str) -> None:
    assert describe(Example.model_fields[name]) == words


@pytest.mark.parametrize("spelt", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_dtypes(spelt: str) -> None:
    assert sections.ModelConfig.model_validate({"dtype": spelt}).dtype == "bf16"


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        (sections.SourceConfig, {"sample_ratio": 0.5, "sample_count": 3}),
        (sections.DataConfig, {"sources": [sections.SourceConfig()], "train_eval_split": [0.9, 0.2]}),
        (sections.DataConfig, {"sources": [sections.SourceConfig()], "train_eval_split": [-0.1, 1.1]}),
        (sections.DataConfig, {"sources": []}),
        (sections.OptimizerConfig, {"betas": [0.9, 1.0]}),
        (sections.OptimizerConfig, {"lr": -1}),
    ],
)
def test_rules_of_sections(section: type[Config], keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        section.model_validate(keys)
