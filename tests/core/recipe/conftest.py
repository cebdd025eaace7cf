"""Small parts and trainers to load recipes with, so that these tests need no torch and no other package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from ptrain import parts
from ptrain.catalog import Catalog, Offer
from ptrain.recipe import sections
from ptrain.recipe.config import Config
from ptrain.recipe.load import Loaded, load_recipe


class TinyModel(parts.Model):
    class Config(sections.ModelConfig):
        attn_implementation: str = "sdpa"
        """How attention is computed."""
        config: dict[str, Any] = {}
        """Free keys."""


class DeepModel(parts.Model):
    class Config(sections.ModelConfig):
        layers: Annotated[int, Field(ge=1)]
        """How many layers."""


class TinyTokenizer(parts.Tokenizer):
    pass


class TinyOptimizer(parts.Optimizer):
    pass


class TinyScheduler(parts.Scheduler):
    class Config(sections.SchedulerConfig):
        name: str = "linear"
        """Which schedule."""
        warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
        """The share of warm-up."""


class Wsd(parts.Scheduler):
    class Config(sections.SchedulerConfig):
        num_decay_steps: sections.Count
        """Steps of the decay."""


class Named(parts.Source):
    class Config(sections.SourceConfig):
        name_or_path: str
        """The data set."""
        role_mapping: dict[str, str] = {}
        """Roles."""


class Lines(parts.Source):
    class Config(sections.SourceConfig):
        path: str
        """The file."""


class Saver(parts.Checkpoint):
    pass


class Scorer(parts.Evaluator):
    pass


class Shouter(parts.Tracker):
    class Config(sections.TrackerConfig):
        url: str = ""
        """Where to."""


class Halves(Config):
    left: int = 0
    """One half."""
    right: int = 0
    """The other."""


class Splitter(parts.Feature):
    class Config(Config):
        size: sections.Positive = 1
        """How many."""
        halves: Halves = Halves()
        """A section of its own."""


class Tiny(parts.Trainer):
    class Config(Config):
        temperature: float = 1.0
        """A key of the trainer."""
        gen_length: int = 8
        """Another one."""
        aliases = {"model.gen_length": "gen_length", "temp": "temperature"}

    class Data(sections.DataConfig):
        pack: bool = False
        """A key of its data."""

    parts = {"source": "named"}


class Tinier(Tiny):
    """A trainer that extends another."""

    parts = {"source": "named", "model": "deep", "evaluator": "score"}


OFFERS = [
    ("trainer", "tiny", Tiny),
    ("trainer", "tinier", Tinier),
    ("model", "huggingface", TinyModel),
    ("model", "deep", DeepModel),
    ("tokenizer", "huggingface", TinyTokenizer),
    ("optimizer", "adamw", TinyOptimizer),
    ("scheduler", "huggingface", TinyScheduler),
    ("scheduler", "wsd", Wsd),
    ("source", "named", Named),
    ("source", "lines", Lines),
    ("checkpoint", "huggingface", Saver),
    ("evaluator", "score", Scorer),
    ("tracker", "shout", Shouter),
    ("plugin", "splitter", Splitter),
]

MINIMAL = """\
type: tiny
model: {name_or_path: m}
data: {sources: [a/b]}
"""


@pytest.fixture
def catalog() -> Catalog:
    """Everything above, as one distribution offers it."""
    return Catalog().with_classes(
        {Offer(kind, name, "ptrain-tiny", "1.0", f"tiny:{cls.__name__}"): cls for kind, name, cls in OFFERS}
    )


@pytest.fixture
def load(tmp_path: Path, catalog: Catalog) -> Callable[..., Loaded]:
    """Load a recipe that is given as text (`r.yaml` in messages) or as data."""

    def load(text: str | dict[str, Any] = MINIMAL, *overrides: str, **options: Any) -> Loaded:
        if isinstance(text, dict):
            return load_recipe(text, overrides, catalog=catalog, **options)
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides, catalog=options.pop("catalog", catalog), **options)

    return load


@pytest.fixture
def problems(load: Callable[..., Loaded]) -> Callable[..., list[str]]:
    """What is wrong with a recipe: `line:column message | expected | fix` of each problem."""
    from ptrain.errors import PtrainError

    def problems(text: str, *overrides: str, **options: Any) -> list[str]:
        with pytest.raises(PtrainError) as caught:
            load(text, *overrides, **options)
        assert caught.value.exit_code == 2
        told = []
        for problem in caught.value.problems:
            where = problem.where
            place = "" if where is None else f"{where.line}:{where.column} " if where.line else f"{where.file} "
            told.append(" | ".join([place + problem.message, problem.expected or "", problem.fix or ""]))
        return told

    return problems
