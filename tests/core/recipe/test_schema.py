"""The JSON schema: it takes every right recipe and refuses the wrong ones that an editor can see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ptrain.catalog import Catalog, Offer
from ptrain.recipe.schema import schema
from ptrain.recipe.tree import read, read_file

pytestmark = pytest.mark.torch_free

MINIMAL = "type: tiny\nmodel: {}\ndata: {sources: [a]}\n"
RIGHT = [
    MINIMAL,
    "type: tinier\nmodel: {layers: 2k}\ndata: {sources: a}",
    "type: tinier\nmodel: {type: huggingface, dtype: torch.bfloat16}\ndata: {sources: [{type: lines, path: x}, {name_or_path: y}], eval_sources: []}",
    "type: tiny\nmodel: {x-note: 1}\nx-note: {}\ndata: {type: tiny, sources: [a], max_length: 4ki, pack: true}\nepochs: 1.5\nseed: '7'",
    MINIMAL + "optimizer: {lr: 1e-5}\nscheduler: {type: wsd, num_decay_steps: 3}\ntemp: 3",
    MINIMAL + "checkpoint: {type: huggingface}\nevaluation: [score]\ntrackers: [{type: shout, url: u}]",
    MINIMAL + "plugins: {splitter: {size: 2, halves: {left: 1}}}\nmetadata: {any: [thing]}",
    MINIMAL + "plugins: {splitter: }\nlogger: {print_output_ranks: '*'}\nwandb: {enable: true, entity: null}",
    MINIMAL + "deepspeed: {zero_optimization: {stage: 2, reduce_bucket_size: 5e8, max_live_parameters: 10M}}",
    "type: tiny\nmodel: {type: 'ptrain-tiny:huggingface', whatever: 1}\ndata: {sources: [a]}",
    "type: ptrain-tiny:tiny\nmodel: {}\ndata: {sources: [a]}",
    "type: tiny\nmodel: {}\ndata: {sources: [a], type: }",
    "type: tiny\nmodel: {}\ndata: {sources: [a], type: ''}",
    "type: mine\ncode: train.py\nmodel: {anything: 1}\ndata: {}",
]
WRONG = [
    "model: {}\ndata: {sources: [a]}",
    "type: tinny\nmodel: {}\ndata: {sources: [a]}",
    "type: tiny\ndata: {sources: [a]}",
    "type: tiny\nmodel: {nme_or_path: x}\ndata: {sources: [a]}",
    "type: tiny\nmodel: {type: hugingface}\ndata: {sources: [a]}",
    "type: tinier\nmodel: {}\ndata: {sources: [a]}",
    "type: tinier\nmodel: {layers: 0}\ndata: {sources: [a]}",
    "type: tinier\nmodel: {layers: many}\ndata: {sources: [a]}",
    "type: tiny\nmodel: {layers: 2}\ndata: {sources: [a]}",
    "type: tiny\nmodel: {dtype: int4}\ndata: {sources: [a]}",
    "type: tiny\nmodel: {}\ndata: {}",
    "type: tiny\nmodel: {}\ndata: {sources: [{type: lines}]}",
    "type: tiny\nmodel: {}\ndata: {sources: [{paht: x}]}",
    "type: tiny\nmodel: {}\ndata: {sources: [a], type: dpo}",
    MINIMAL + "sede: 1",
    MINIMAL + "seed: true",
    MINIMAL + "epochs: -1",
    MINIMAL + "eval_at_start: 'yes'",
    MINIMAL + "scheduler: {type: wsd}",
    MINIMAL + "scheduler: {num_decay_steps: 3}",
    MINIMAL + "checkpoint: [{output_dir: x}]",
    MINIMAL + "logger: {level: loud}",
    MINIMAL + "plugins: {spliter: {}}",
    MINIMAL + "plugins: {splitter: {sice: 1}}",
    MINIMAL + "deepspeed: {zero_optimization: {stge: 2}}",
    MINIMAL + "deepspeed: {train_batch_size: 2}",
]


@pytest.fixture
def validator(catalog: Catalog) -> jsonschema.Draft202012Validator:
    """A validator of the fixture parts' schema, which is checked itself."""
    made = schema(catalog)
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


@pytest.mark.parametrize("text", RIGHT)
def test_right(validator: jsonschema.Draft202012Validator, text: str) -> None:
    assert [error.message for error in validator.iter_errors(read(text).data)] == []


@pytest.mark.parametrize("text", [text for text in RIGHT if "code:" not in text and "whatever" not in text])
def test_right_recipes_load(load: Callable[..., Any], text: str) -> None:
    assert load(text).recipe.type


@pytest.mark.parametrize("text", WRONG)
def test_wrong(validator: jsonschema.Draft202012Validator, problems: Callable[..., list[str]], text: str) -> None:
    assert not validator.is_valid(read(text).data)
    assert problems(text)


def documented(node: Any, path: str = "") -> list[str]:
    """The places of keys that have no description."""
    silent = []
    for name, inner in node.get("properties", {}).items():
        if isinstance(inner, dict) and "$ref" not in inner and not inner.get("description"):
            silent.append(f"{path}.{name}")
    return silent


def test_keys_are_documented(catalog: Catalog) -> None:
    made = schema(catalog)
    assert [name for label, one in made["$defs"].items() for name in documented(one, label)] == []
    assert made["$defs"]["core"]["properties"]["seed"]["description"].startswith("Seed of everything")
    assert made["$defs"]["optimizer.adamw"]["properties"]["lr"]["description"] == "The same as `learning_rate`."


def test_broken_and_contested_offers(catalog: Catalog) -> None:
    wsd = next(cls for offer, cls in catalog.classes.items() if (offer.kind, offer.name) == ("scheduler", "wsd"))
    more = catalog.with_classes({Offer("scheduler", "wsd", "ptrain-other", "1", "x:X"): wsd})
    more = Catalog((*more.all, Offer("scheduler", "gone", "ptrain-gone", "1", "no_such_module_at_all:X")), more.classes)
    text = MINIMAL + "scheduler: {type: TYPE, num_decay_steps: STEPS}"
    validator = jsonschema.Draft202012Validator(schema(more))
    for name, steps, valid in [
        ("wsd", 3, False),
        ("gone", 3, False),
        ("ptrain-other:wsd", 3, True),
        ("ptrain-other:wsd", -3, False),
    ]:
        assert validator.is_valid(yaml.safe_load(text.replace("TYPE", name).replace("STEPS", str(steps)))) is valid


ROOT = Path(__file__).parents[3]
SHIPPED = [
    *sorted((ROOT / "recipes").glob("*.yaml")),
    *sorted((ROOT.parent / "shared" / "reference-recipes").glob("*.yaml")),
]


@pytest.fixture(scope="module")
def installed() -> jsonschema.Draft202012Validator:
    """A validator of the schema of what is installed."""
    made = schema(Catalog.installed())
    jsonschema.Draft202012Validator.check_schema(made)
    assert [name for label, one in made["$defs"].items() for name in documented(one, label)] == []
    return jsonschema.Draft202012Validator(made)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes(installed: jsonschema.Draft202012Validator, path: Path) -> None:
    data = read_file(path).data
    assert [error.message for error in installed.iter_errors(data)] == []
    for key in [key for key in data if key != "code"]:
        assert not installed.is_valid({("x" + name if name == key else name): value for name, value in data.items()})
    for wrong in ({"sede": 1}, {"epochs": "many"}, {"optimizer": {"lr": True}}, {"deepspeed": {"optimizer": {}}}):
        assert "code" in data or not installed.is_valid({**data, **wrong})
