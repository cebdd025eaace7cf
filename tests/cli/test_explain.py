"""`ptrain explain`: who acts at each stage, and where each setting comes from."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.torch_free

Ptrain = Callable[..., tuple[int, str, str]]
RECIPE = """\
type: mine
model: {name_or_path: "${env:WHERE}/model", dtype: fp32}
data:
  sources: [some/rows, {type: jsonl, path: a.jsonl}]
checkpoint: {type: huggingface, save_end_of_training: true}
trackers: [tensorboard]
plugins: {}
seed: 7
"""
CODE = """\
import ptrain
from ptrain_sft.plugin import SFT

@ptrain.register("trainer", "mine")
class Mine(SFT):
    callbacks = [("post-load", lambda run, result: None)]

    @ptrain.hookimpl(wrapper=True)
    def create_model(self, run, config):
        return (yield)

    @ptrain.hookimpl
    def configure(self, run):
        run.derive("data.div_length", 16, because="it is tried here")

@ptrain.hookimpl
def loss(run, batch):
    return batch

@ptrain.hookimpl(wrapper=True)
def create_model(run, config):
    return (yield)

@ptrain.callback("pre-create-model")
def before(run):
    pass
"""


@pytest.fixture
def explained(ptrain: Ptrain, tmp_path: Path) -> dict[str, Any]:
    """What the command says of a recipe with code, as JSON; the variable that it refers to is not set."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "mine.py").write_text(textwrap.dedent(CODE))
    code, out, err = ptrain("explain", "r.yaml", "--code", "mine.py", "-o", "optimizer.lr=2e-5", "--json")
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["mine.py", "r.yaml"]
    return json.loads(out)


def test_stages(explained: dict[str, Any], tmp_path: Path) -> None:
    stages = explained["stages"]
    found = [
        (act["role"], act["layer"], act["where"].partition("mine.py:")[2]) for act in stages["create_model"]["acts"]
    ]
    assert found == [
        ("pre-create-model", "user code", "24"), ("wraps", "user code", "20"), ("wraps", "mine", "8"), ("answers", "core", "")
    ]  # fmt: skip
    assert [(act["role"], act["layer"]) for act in stages["load"]["acts"]] == [
        ("post-load", "mine"),
        ("answers", "core"),
    ]
    assert [(act["layer"], act["origin"]) for act in stages["loss"]["acts"]] == [
        ("user code", str(tmp_path / "mine.py")), ("mine", stages["loss"]["acts"][1]["origin"])
    ]  # fmt: skip
    assert re.search(r"ptrain_sft/plugin\.py:\d+$", stages["loss"]["acts"][1]["where"])
    assert stages["on_step_end"] == {"kind": "all", "acts": []} and stages["loss"]["kind"] == "first"


def test_settings(explained: dict[str, Any]) -> None:
    found = {one["key"]: (one["value"], one["origin"], one["source"]) for one in explained["settings"]}
    assert found["seed"] == (7, "recipe", "r.yaml:8:1")
    assert found["micro_batch_size"] == (1, "default", "")
    assert found["optimizer.learning_rate"] == (2e-5, "override", "-o optimizer.lr=2e-5")
    assert found["data.div_length"] == (16, "derived", "it is tried here")
    assert found["data.sources.0.name_or_path"] == ("some/rows", "recipe", "r.yaml:4:13")
    assert found["data.sources.1.path"] == ("a.jsonl", "recipe", "r.yaml:4:38")
    assert found["checkpoint.0.save_end_of_training"] == (True, "recipe", "r.yaml:5:33")
    assert found["trackers.0.type"] == ("tensorboard", "recipe", "r.yaml:6:12")
    (model,) = (one for one in explained["settings"] if one["key"] == "model.name_or_path")
    assert model["value"] == "${env:WHERE}/model" and model["environment"] == ["WHERE"]


def test_for_people(ptrain: Ptrain, recipe: Path) -> None:
    """The same, and no secret: references stay references."""
    recipe.write_text(recipe.read_text() + "wandb: {entity: '${env:SECRET}'}\n")
    code, out, err = ptrain("explain", recipe, env={"SECRET": "hush"})
    assert code == 0, err
    lines = out.splitlines()
    at = lines.index("loss (first)")
    assert lines[at + 1].split()[:4] == ["answers", "sft", "ptrain-sft", "0.1.0"]
    assert "configure (all): nobody" in lines
    (entity,) = (line for line in lines if line.startswith("wandb.entity"))
    assert "${env:SECRET}" in entity and entity.endswith("(environment: SECRET)") and "hush" not in out


def test_what_is_wrong_is_said_as_by_check(ptrain: Ptrain, recipe: Path) -> None:
    code, out, err = ptrain("explain", recipe, "-o", "optimizer.lrr=1")
    assert (code, out) == (2, "") and "`lrr`" in err
