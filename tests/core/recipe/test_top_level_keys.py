"""Top-level keys that mean keys of a feature: of those that a recipe names, and of the reference system's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from ptrain import parts
from ptrain.catalog import Catalog, Offer
from ptrain.errors import PluginError
from ptrain.recipe.config import Config
from ptrain.recipe.document import from_mapping
from ptrain.recipe.elsewhere import FEATURES
from ptrain.recipe.keys import known_keys
from ptrain.recipe.load import Loaded
from ptrain.recipe.schema import schema
from ptrain.recipe.sections import Positive

pytestmark = pytest.mark.torch_free

Load = Callable[..., Loaded]
Problems = Callable[..., list[str]]
MINIMAL = "type: tiny\nmodel: {}\ndata: {sources: [a]}\n"


class Windows(parts.Feature):
    """A feature with keys at the top level."""

    class Config(Config):
        """Its keys."""

        size: Positive = 1
        """How many."""
        tiles: Literal["auto"] | bool | Positive = "auto"
        """A word, a truth value or a number."""
        aliases = {".window": "size", ".sequence_parallel_size": "size", ".tiled_mlp_compute": "tiles"}


class Taking(parts.Feature):
    """A feature whose key is core's."""

    class Config(Config):
        """Its keys."""

        size: Positive = 1
        """How many."""
        aliases = {".seed": "size"}


@pytest.fixture
def catalog(catalog: Catalog) -> Catalog:
    """The tiny one, and features with keys at the top level; one has the name that the reference's keys mean."""
    offers = {"windows": Windows, "sequence-parallel": Windows, "taking": Taking}
    return catalog.with_classes(
        {Offer("plugin", name, "ptrain-long", "1.0", name): cls for name, cls in offers.items()}
    )


def size(loaded: Loaded) -> int:
    """What the feature of the reference's keys has for one of them."""
    return loaded.recipe.plugins["sequence-parallel"].model_dump()["size"]


def test_a_named_feature_takes_its_keys(load: Load) -> None:
    loaded = load(MINIMAL + "window: 2k\nplugins: {windows: {tiles: false}}\n")
    assert loaded.recipe.plugins["windows"].model_dump() == {"size": 2000, "tiles": False}
    assert str(loaded.positions["plugins", "windows", "size"]).endswith("r.yaml:4:1")
    assert list(loaded.recipe.plugins) == ["windows"]


def test_keys_of_the_reference_name_their_feature(load: Load) -> None:
    """One entry, however many of its keys there are; it is dumped as if it had been written."""
    loaded = load(MINIMAL + "sequence_parallel_size: 4\ntiled_mlp_compute: true\n")
    assert loaded.recipe.plugins["sequence-parallel"].model_dump() == {"size": 4, "tiles": True}
    assert loaded.features == {"sequence-parallel": Windows}
    assert "sequence-parallel:\n    size: 4\n    tiles: true\n" in str(loaded.recipe)
    assert size(load(MINIMAL, "sequence_parallel_size=2")) == 2
    assert not load(MINIMAL).features


def test_a_feature_that_is_named_is_not_added_again(load: Load) -> None:
    written = MINIMAL + "sequence_parallel_size: 4\nplugins: {'ptrain-long:sequence-parallel': {tiles: 8}}\n"
    (config,) = load(written).recipe.plugins.values()
    assert config.model_dump() == {"size": 4, "tiles": 8}


def test_an_override_takes_the_place_of_either_spelling(load: Load) -> None:
    written = MINIMAL + "plugins: {sequence-parallel: {size: 8}}\n"
    assert size(load(written, "sequence_parallel_size=2")) == 2
    written = MINIMAL + "sequence_parallel_size: 8\n"
    assert size(load(written, "plugins.sequence-parallel.size=2")) == 2


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (
            "window: 2\nplugins: {windows: {size: 3}}",
            "5:21 `plugins.windows.size` is given twice, lines 4 and 5: `window` is the same key |  | keep one",
        ),
        ("window: 2", "4:1 there is no key `window` at the top level |  | write `windows` in `plugins`"),
        ("windo: 2\nplugins: {windows: {}}", "4:1 there is no key `windo` at the top level |  | write `window`"),
        (
            "sequence_paralel_size: 2",
            "4:1 there is no key `sequence_paralel_size` at the top level |  | write `sequence_parallel_size`",
        ),
        (
            "activation_checkpoint_cpu_offload: true",
            "4:1 there is no key `activation_checkpoint_cpu_offload` at the top level here: it comes with the package "
            "ptrain-sequence-parallel |  | pip install ptrain-sequence-parallel, or leave it out where it is `false`",
        ),
        ("sequence_parallel_size: 0", "4:25 `plugins.sequence-parallel.size` is 0 | a whole number of at least 1 | "),
        (
            "tiled_mlp_compute: on",
            "4:20 `plugins.sequence-parallel.tiles`: `auto` or `true` or `false` or a whole number of at least 1 "
            "is expected, not `on` |  | ",
        ),
    ],
)
def test_what_is_wrong_stands_where_it_is_written(problems: Problems, more: str, found: str) -> None:
    assert problems(MINIMAL + more + "\n") == [found]


def test_a_feature_may_not_take_names_of_core(load: Load) -> None:
    with pytest.raises(PluginError, match=r"plugin `taking` of ptrain-long 1[.]0 takes `seed`"):
        load(MINIMAL + "plugins: {taking: {}}\n")


def test_schema_and_completion_know_them(catalog: Catalog) -> None:
    tiny: Any = next(one["then"] for one in schema(catalog)["allOf"] if one.get("if", {}).get("required") == ["type"])
    assert tiny["properties"]["window"]["description"] == "The same as `plugins.windows.size`."
    keys = known_keys(from_mapping({"type": "tiny", "plugins": {"windows": {}}}), catalog)
    assert "window" in keys[""] and "window" not in known_keys(from_mapping({"type": "tiny"}), catalog)[""]
    assert set(FEATURES) <= keys[""]
