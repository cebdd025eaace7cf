"""The fixtures of `ptrain.testing`, as a plugin's tests use them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ptrain.errors import RecipeError
from ptrain.testing import contract
from ptrain.testing.workers import WorkerFailed

USER_CODE = """
import ptrain

@ptrain.hookimpl
def on_start(run):
    if run.rank == 1:
        raise ptrain.TrainingError("rank 1 has had enough")
"""


@pytest.mark.torch_free
def test_loading_is_light() -> None:
    """pytest loads the fixtures in every project where ptrain-core is installed."""
    code = (
        "import sys, ptrain.testing.fixtures, ptrain.testing.checks;"
        "sys.exit(str(sorted({'torch', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]", done.stderr


@pytest.mark.torch_free
def test_the_checks_need_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import ptrain.testing.checking, ptrain.testing.checks"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.torch_free
def test_the_kinds_of_a_contract() -> None:
    with pytest.raises(ValueError, match=r"there is no kind `trainers`; there are: trainer, model"):
        contract("trainers", "sft")


def test_two_workers_and_resume(ptrain_run: Any, ptrain_recipe: Any, ptrain_data: Any) -> None:
    """Two workers learn what one does, and a run that was cut off goes on."""
    import torch

    recipe = ptrain_recipe("sft", micro_batch_size=2)
    assert recipe["data"]["sources"][0]["path"] == str(ptrain_data("conversations"))
    shared = ptrain_run(recipe, workers=2)
    alone = ptrain_run(ptrain_recipe("sft"))
    assert shared.losses == pytest.approx(alone.losses, abs=1e-5)
    for name, value in alone.weights.items():
        torch.testing.assert_close(shared.weights[name], value, atol=1e-5, rtol=0)
    cut = ptrain_run({**ptrain_recipe("sft"), "exit_iteration": 2})
    assert len(cut.losses) == 2
    with pytest.raises(FileNotFoundError, match="there is no export"):
        _ = cut.weights
    whole = ptrain_run(ptrain_recipe("sft"), resume=True)
    assert whole.dir == cut.dir and whole.losses == alone.losses
    assert "resumed from" in whole.output


@pytest.mark.parametrize(("trainer", "shape"), [("sft", "conversations"), ("causal", "text"), ("dpo", "preferences")])
def test_the_shapes_of_rows(trainer: str, shape: str, ptrain_recipe: Any, ptrain_data: Any, tmp_path: Path) -> None:
    """A trainer that is known gets its own; `rows` says it for others."""
    from ptrain.testing.runs import prepare_rows

    assert ptrain_recipe(trainer) == ptrain_recipe(trainer, rows=shape)
    prepare_rows(ptrain_recipe(trainer), tmp_path)
    with pytest.raises(ValueError, match=r"no shape of rows `chats`; there are: conversations, instructions"):
        ptrain_data("chats")


def test_instructions(ptrain_recipe: Any, ptrain_data: Any, tmp_path: Path) -> None:
    """Of a prompt and its completion `sft` makes a conversation, where the source does."""
    from ptrain.testing.runs import prepare_rows

    folder = tmp_path / "instructions"
    folder.mkdir()
    shutil.copy(ptrain_data("instructions"), folder / "train.jsonl")
    sources = [{"type": "huggingface_instruct", "name_or_path": str(folder)}]
    prepare_rows(ptrain_recipe("sft", data={"sources": sources}), tmp_path)


def test_the_tokenizer_is_the_models(ptrain_tokenizer: Any, ptrain_model: Path) -> None:
    ids = ptrain_tokenizer("one small bird")["input_ids"]
    assert ptrain_tokenizer.decode(ids) == "one small bird" and max(ids) < len(ptrain_tokenizer)
    assert (ptrain_model / "model.safetensors").stat().st_size < 1 << 20


def test_failures_are_told(ptrain_run: Any, ptrain_recipe: Any, tmp_path: Path) -> None:
    """What is refused is refused here; what fails in a worker comes with what it wrote."""
    with pytest.raises(RecipeError, match="`optimizer` has no key `lrr`"):
        ptrain_run(ptrain_recipe("sft", optimizer={"lrr": 1}))
    code = tmp_path / "had_enough.py"
    code.write_text(USER_CODE)
    with pytest.raises(WorkerFailed, match="TrainingError: rank 1 has had enough") as caught:
        ptrain_run(ptrain_recipe("sft", micro_batch_size=2), workers=2, code=code)
    assert "Traceback" in caught.value.output


def test_nothing_to_resume(ptrain_run: Any, ptrain_recipe: Any) -> None:
    with pytest.raises(ValueError, match="there is no run before"):
        ptrain_run(ptrain_recipe("sft"), resume=True)
