"""Every key of every shipped recipe, misspelt or put into another section: refused, with what was meant.

Each character of each key is dropped and swapped with its neighbour, and characters are inserted everywhere;
every key is moved to every other section of its recipe. Keys of free maps are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ptrain.catalog import Catalog
from ptrain.errors import PtrainError
from ptrain.recipe import sections
from ptrain.recipe.config import Config
from ptrain.recipe.deepspeed_keys import DeepSpeedConfig, Zero
from ptrain.recipe.document import Place
from ptrain.recipe.load import Loaded, load_recipe
from ptrain.recipe.tree import read_file

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT.parent / "shared" / "reference-recipes"
SHIPPED = ("quickstart", "sft-gsm8k", "swiftkv-gsm8k", "speculator-llama-3.1-8b")
"""One of each trainer: others of it have the same keys."""
RECIPES = [
    *(ROOT / "recipes" / f"{name}.yaml" for name in SHIPPED),
    *(path for path in sorted(PUBLISHED.glob("*.yaml")) if path.stem in ("causal", "sft-quickstart", "sft-llama-8b")),
]
FREE = {
    "metadata",
    "config",
    "hf_config_kwargs",
    "kwargs",
    "role_mapping",
    "split_mapping",
    "scheduler_specific_kwargs",
}
SHARE = 0.95
EACH = [pytest.param(p, marks=[pytest.mark.torch_free] * (p.stem == "quickstart"), id=p.stem) for p in RECIPES]
"""The recipes; what is misspelt in all of them is looked up alike on every Python, so that one is enough for others."""


@dataclass(frozen=True)
class Mutation:
    """One change of a recipe: the key at `place` becomes `key` of the section at `target`."""

    place: Place
    target: Place
    key: str

    def apply(self, data: dict[str, Any]) -> dict[str, Any]:
        data = copy.deepcopy(data)
        holder = at(data, self.place[:-1])
        if self.target == self.place[:-1]:  # misspelt where it stands, in its place among the others
            changed = {self.key if key == self.place[-1] else key: value for key, value in holder.items()}
            holder.clear()
            holder.update(changed)
        else:
            value = holder.pop(self.place[-1])
            at(data, self.target)[self.key] = value
        return data


def at(data: Any, place: Place) -> Any:
    for step in place:
        data = data[step]
    return data


def holders(data: Any, place: Place = ()) -> Iterator[Place]:
    """The place of every section: of mappings that are no free maps."""
    if isinstance(data, dict):
        yield place
        for key, value in data.items():
            if key not in FREE:
                yield from holders(value, (*place, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from holders(value, (*place, index))


def keys(data: dict[str, Any]) -> list[Place]:
    return [(*place, key) for place in holders(data) for key in at(data, place)]


def misspelt(key: str) -> set[str]:
    dropped = {key[:i] + key[i + 1 :] for i in range(len(key))}
    inserted = {key[:i] + letter + key[i:] for i in range(len(key) + 1) for letter in ("x", key[max(i - 1, 0)])}
    swapped = {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
    return (dropped | inserted | swapped) - {key, ""}


def spellings(data: dict[str, Any]) -> Iterator[Mutation]:
    for place in keys(data):
        for key in sorted(misspelt(str(place[-1])) - set(at(data, place[:-1]))):
            yield Mutation(place, place[:-1], key)


def moves(data: dict[str, Any]) -> Iterator[Mutation]:
    for place in keys(data):
        for target in holders(data):
            inside = target[: len(place)] == place
            if target != place[:-1] and not inside and place[-1] not in at(data, target):
                yield Mutation(place, target, str(place[-1]))


def accepted(loaded: Loaded, place: Place) -> set[str]:
    """The keys that may stand in the section at `place`, as its classes declare them."""
    names = [step for step in place if isinstance(step, str)]
    number = next((step for step in place if isinstance(step, int)), 0)
    if place == ():
        every = set(sections.CoreConfig.model_fields) | set(loaded.trainer.Config.model_fields)
        return every | set(sections.Recipe.model_fields) - {"trainer"}
    lists = {
        ("data", "sources"): loaded.sources,
        ("checkpoint",): loaded.checkpoint,
        ("evaluation",): loaded.evaluation,
        ("trackers",): loaded.trackers,
    }
    single: dict[tuple[str, ...], type[Config]] = {
        ("data",): loaded.trainer.Data,
        ("logger",): sections.LoggerConfig,
        ("wandb",): sections.WandbConfig,
        ("deepspeed",): DeepSpeedConfig,
        ("deepspeed", "zero_optimization"): Zero,
        ("model",): loaded.model.Config,
        ("tokenizer",): loaded.tokenizer.Config,
        ("optimizer",): loaded.optimizer.Config,
        ("scheduler",): loaded.scheduler.Config,
    }
    config = lists[tuple(names)][number].Config if tuple(names) in lists else single[tuple(names)]
    moved = {alias.rpartition(".") for alias in loaded.trainer.Config.aliases}
    here = {key for section, _, key in moved if section and section == ".".join(names)}
    return set(config.model_fields) | set(config.aliases) | here


def home(place: Place) -> str:
    """What messages call the section of the key at `place`."""
    named = [str(step) for step in place[:-1] if isinstance(step, str)]
    return f"in `{'.'.join(named)}`" if named else "at the top level"


def is_right(mutation: Mutation, data: dict[str, Any], error: PtrainError) -> bool:
    """Whether some problem says which key was meant, and, of a moved key, where it belongs."""
    original, fixes = str(mutation.place[-1]), [problem.fix or "" for problem in error.problems]
    if mutation.target == mutation.place[:-1]:
        return any(f"`{original}`" in fix for fix in fixes)
    belongs = [
        home(mutation.place),
        # A key that DeepSpeed has too: "remove it and set `optimizer`".
        f"set `{'.'.join(map(str, mutation.place))}`",
        # A type that is not there: "it is a key of `type: train`", says the section that lacks it.
        f"`type: {at(data, mutation.place)}`",
    ]
    # Where the other section takes the key, what is left is that the first one lacks it.
    lacks = [
        f"`{'.'.join(map(str, mutation.place))}` is missing",
        f"`{'.'.join(map(str, mutation.place[:-1]))}` has no `{original}`",
    ]
    lacks.append(f"`{original}` is missing: the recipe names no trainer" if len(mutation.place) == 1 else lacks[0])
    messages = [problem.message for problem in error.problems]
    return any(words in fix for words in belongs for fix in fixes) or any(one in messages for one in lacks)


@pytest.fixture(scope="module")
def installed() -> Catalog:
    return Catalog.installed()


def judged(path: Path, catalog: Catalog, mutations: Iterator[Mutation]) -> list[tuple[Mutation, str | None, bool]]:
    """Each mutation, the error that it gives (None where it is valid), and whether that is right."""
    found = []
    data = read_file(path).data
    assert load_recipe(data, catalog=catalog)
    for mutation in mutations:
        try:
            loaded = load_recipe(mutation.apply(data), catalog=catalog)
        except PtrainError as error:
            assert error.exit_code == 2
            found.append((mutation, str(error), is_right(mutation, data, error)))
        else:
            assert mutation.key in accepted(loaded, mutation.target), f"{mutation} was taken"
            found.append((mutation, None, True))
    return found


def check(path: Path, results: list[tuple[Mutation, str | None, bool]]) -> None:
    refused = [(mutation, told, right) for mutation, told, right in results if told is not None]
    wrong = [f"{mutation}\n{told}" for mutation, told, right in refused if not right]
    share = 1 - len(wrong) / len(refused)
    assert share >= SHARE, f"{path.name}: {share:.1%} of {len(refused)}\n" + "\n\n".join(wrong[:20])


@pytest.mark.parametrize("path", EACH)
def test_misspelt_keys(path: Path, installed: Catalog) -> None:
    results = judged(path, installed, spellings(read_file(path).data))
    assert len(results) > 200
    # A mutation that is valid must be the exception, or this test tests nothing.
    assert sum(told is None for _, told, _ in results) <= len(results) // 50
    check(path, results)


@pytest.mark.parametrize("path", EACH)
def test_keys_in_another_section(path: Path, installed: Catalog) -> None:
    results = judged(path, installed, moves(read_file(path).data))
    assert len(results) > 20
    check(path, results)


@pytest.mark.parametrize("path", EACH)
def test_the_place_is_that_of_the_key(path: Path, installed: Catalog, tmp_path: Path) -> None:
    """In the text of the recipe, each misspelt key is reported at its line and column."""
    document = read_file(path)
    lines = document.text.splitlines()
    for place in keys(document.data):
        where = document.keys[place]
        key = str(place[-1])
        line = lines[where.line - 1]
        assert line[where.column - 1 :].startswith(key)
        changed = [*lines]
        changed[where.line - 1] = f"{line[: where.column - 1]}{key[0]}{key}{line[where.column - 1 + len(key) :]}"
        (tmp_path / "r.yaml").write_text("\n".join(changed))
        with pytest.raises(PtrainError) as caught:
            load_recipe(tmp_path / "r.yaml", catalog=installed)
        places = [(problem.where.line, problem.where.column) for problem in caught.value.problems if problem.where]
        assert (where.line, where.column) in places


def test_there_is_something_to_test() -> None:
    assert [path for path in RECIPES if path.is_relative_to(ROOT)], "no recipe ships"
