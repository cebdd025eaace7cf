"""Code that comes with a model runs at the commit that the recipe pins, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import finish, start

READ, LATER = "0" * 40, "1" * 40
"""Commits: the one that was read, and what `main` has become."""
CONFIGURATION = """
import os
from transformers import LlamaConfig
with open(os.environ["RAN"], "a") as file: print("{commit}", file=file)
class StrangeConfig(LlamaConfig): model_type = "strange"
"""
MODELING = """
import os
from transformers import LlamaForCausalLM
from .configuration_strange import StrangeConfig
with open(os.environ["RAN"], "a") as file: print("{commit}", file=file)
class StrangeForCausalLM(LlamaForCausalLM): config_class = StrangeConfig
"""


def publish(cache: Path, name: str, tiny_model: Path, code: str = "") -> None:
    """As the hub keeps on the disk a model with code of its own, or with that of the repository `code`."""
    place = cache / f"models--{name.replace('/', '--')}"
    for commit in (READ, LATER):
        snapshot = Path(shutil.copytree(tiny_model, place / "snapshots" / commit))
        file, before = snapshot / "config.json", f"{code}--" if code else ""
        parts = {"AutoConfig": "configuration_strange.StrangeConfig"}
        parts["AutoModelForCausalLM"] = "modeling_strange.StrangeForCausalLM"
        keys = {"model_type": "strange", "auto_map": {kind: before + part for kind, part in parts.items()}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
        (snapshot / "configuration_strange.py").write_text(CONFIGURATION.format(commit=commit))
        (snapshot / "modeling_strange.py").write_text(MODELING.format(commit=commit))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(LATER)


def ran(recipe: dict[str, Any], tmp_path: Path) -> tuple[int, str, set[str]]:
    """The exit code of a run, what it said, and the commits whose code ran."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log = tmp_path / "ran"
    log.touch()
    places = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "RAN": str(log)}
    code, out, err = finish(start("run", tmp_path / "recipe.yaml", env=places))
    return code, " ".join((out + err).split()), set(log.read_text().split())


@pytest.mark.parametrize("layers", [2, 1])
def test_runs_at_the_commit_that_was_read(layers: int, recipes: Any, tiny_model: Path, tmp_path: Path) -> None:
    """With its weights, and with another number of layers, whose weights are drawn."""
    publish(tmp_path / "hub", "some/model", tiny_model)
    model: dict[str, Any] = {"name_or_path": "some/model", "revision": READ, "trust_remote_code": True}
    recipe = recipes(
        model={**model, "hf_config_kwargs": {"num_hidden_layers": layers}}, train_iters=1, epochs=0,
        tokenizer={"name_or_path": str(tiny_model)}, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    code, said, commits = ran(recipe, tmp_path)
    assert code == 0, said
    assert commits == {READ}


def test_code_of_another_repository_is_refused(recipes: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Of which no commit is pinned: the newest one would run."""
    publish(tmp_path / "hub", "other/code", tiny_model)
    publish(tmp_path / "hub", "some/model", tiny_model, code="other/code")
    model = {"name_or_path": "some/model", "revision": READ, "trust_remote_code": True}
    recipe = recipes(model=model, tokenizer={"name_or_path": str(tiny_model)}, output_dir=str(tmp_path / "run"))
    code, said, commits = ran(recipe, tmp_path)
    assert code == 2, said
    assert "the code of `some/model` is that of `other/code`, of which `model.revision` pins no commit" in said
    assert not commits


def test_the_model_of_an_adapter_is_pinned_too(recipes: Any, tiny_model: Path, tmp_path: Path) -> None:
    """The code is that of the model: a commit of the adapter says nothing of it."""
    publish(tmp_path / "hub", "some/model", tiny_model)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": "some/model", "revision": "main"}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    model = {"name_or_path": str(adapter), "revision": READ, "trust_remote_code": True}
    recipe = recipes(model=model, tokenizer={"name_or_path": str(tiny_model)}, output_dir=str(tmp_path / "run"))
    code, said, commits = ran(recipe, tmp_path)
    assert code == 2, said
    assert "the adapter, which belongs to `some/model`, pins none" in said
    assert not commits
