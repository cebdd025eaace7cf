"""What can be wrong with a recipe of `spec-decode`: one clear message from the command line, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from published import drawn, shape

from ptrain import ModelError, PtrainError
from ptrain.engine import deepspeed_config
from ptrain.testing.recipes import merged
from ptrain.testing.rows import WORDS, conversations, write_rows
from ptrain.testing.workers import WorkerFailed
from ptrain_spec_decode.fits import check_size
from ptrain_spec_decode.layout import Shape, file_name
from ptrain_spec_decode.saved import Base, config_of, vocabulary_digest, write

ROWS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ptrain_model: Path, ptrain_tokenizer: Any) -> Path:
    """With a base, another tokenizer, and speculators for this base and for others."""
    made = tmp_path_factory.mktemp("bad")
    shutil.copytree(ptrain_model, made / "base")
    write_rows(made / "rows.jsonl", conversations(ROWS))
    size = json.loads((ptrain_model / "config.json").read_text())["vocab_size"]
    mine = Base("base", ("LlamaForCausalLM",), vocabulary_digest(ptrain_tokenizer))
    save(made / "fits", mine, hidden_size=64, vocab_size=size)
    lstm = replace(shape("mlp", hidden_size=64, vocab_size=size), kind="lstm")
    save_as(made / "recurrent", lstm, mine, "arctic")
    save(made / "wider", mine, hidden_size=96, vocab_size=size)
    save(made / "fewer-tokens", mine, hidden_size=64, vocab_size=size - 1)
    save(made / "other-class", Base("other", ("GPT2LMHeadModel",)), hidden_size=64, vocab_size=size)
    save(made / "other-ids", Base("other", None, "0123"), hidden_size=64, vocab_size=size)
    other = ptrain_tokenizer.train_new_from_iterator([" ".join(WORDS).upper()] * 3, vocab_size=len(ptrain_tokenizer))
    other.save_pretrained(made / "tokenizer")
    (made / "not-one").mkdir()
    return made


def save(folder: Path, base: Base, **changes: Any) -> None:
    """A speculator in a folder."""
    save_as(folder, shape("mlp", **changes), base, "vllm")


def save_as(folder: Path, wanted: Shape, base: Base, engine: str) -> None:
    """One of this shape, as an engine loads it."""
    folder.mkdir()
    weights = {file_name(name): p.detach().clone() for name, p in drawn(wanted).named_parameters()}
    write(folder, weights, config_of(wanted, base, "float32", engine))


def recipe(folder: Path) -> dict[str, Any]:
    """A recipe with nothing wrong."""
    return {
        "type": "spec-decode",
        "model": {"name_or_path": str(folder / "base"), "dtype": "fp32", "speculator_width": 16},
        "tokenizer": {"chat_template": "chatml"},
        "data": {
            "sources": [{"type": "jsonl", "path": str(folder / "rows.jsonl")}], "max_length": 256,
            "cache_dir": str(folder / "cache"),
        },
        "output_dir": str(folder / "never"), "train_iters": 1,
    }  # fmt: skip


def told(made: dict[str, Any]) -> str:
    """What a run that is prepared in this process is refused with."""
    from ptrain.job import prepare_run
    from ptrain.recipe.load import load_recipe

    with pytest.raises(PtrainError) as error:
        prepare_run(load_recipe(made), None)
    assert error.value.exit_code == 2 and not Path(made["output_dir"]).exists()
    return " ".join(str(error.value).split())


WRONG: dict[str, list[str]] = {
    '{"model": {"speculator": "lstm", "method": "sum_lstm"}}': ["set `speculator_tie_weights: true`"],
    '{"model": {"speculator_width": "40.x"}}': ["'40.x' is no width", "4096.2048"],
    '{"model": {"emb_dim": 8}}': ["the last of `emb_dim` (8)", "must be the same number"],
    '{"model": {"peft_config": {"r": 4}}}': ["the base stays as it is"],
    '{"model": {"disable_activation_checkpoint": false}}': ["the base has no backward pass"],
    '{"model": {"n_speculator_heads": 0}}': ["n_speculator_heads"],
    '{"evaluation": ["speculative"], "data": {"train_eval_split": [0.5, 0.5]}, "model": {"hf_config_kwargs": '
    '{"max_position_embeddings": 2}}}': ["no evaluation row gives a prompt for `speculative`", "room in 2 positions"],
    '{"speculator_path": "FOLDER/not-one"}': ["there is no `config.json`"],
    '{"speculator_path": "FOLDER/fits", "model": {"speculator_path": "FOLDER/fits"}}': ["is given twice"],
    '{"speculator_path": "FOLDER/fewer-tokens"}': ["another base", "whose vocabulary has the size"],
    '{"speculator_path": "FOLDER/other-class"}': ["another base (`other`), of the class GPT2LMHeadModel"],
    '{"speculator_path": "FOLDER/other-ids"}': ["another base (`other`), with a tokenizer of the digest 0123"],
    '{"speculator_path": "FOLDER/fits", "model": {"speculator_width": 24}}': [
        "`model.speculator_width` says 24", "has 16", "fix: leave `speculator_width` out"
    ],
}  # fmt: skip
"""What a recipe may say, and what the message has to hold."""


@pytest.mark.parametrize("changes", WRONG)
def test_what_does_not_fit_together(changes: str, folder: Path) -> None:
    text = told(merged(recipe(folder), json.loads(changes.replace("FOLDER", str(folder)))))
    assert all(part in text for part in WRONG[changes]), text


def test_a_base_of_another_name_is_only_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from ptrain.job import prepare_run
    from ptrain.recipe.load import load_recipe

    made = merged(recipe(folder), {"speculator_path": str(folder / "fits"), "output_dir": str(folder / "made")})
    prepare_run(load_recipe(merged(made, {"data": {"overlength": "drop"}})), None)
    assert "was made for `base`, and this base is" in caplog.text


def test_a_model_part_without_a_speculator(folder: Path) -> None:
    made = recipe(folder)
    del made["model"]["speculator_width"]
    text = told(merged(made, {"model": {"type": "huggingface"}}))
    assert "the model part `huggingface` makes no speculator" in text and "leave `model.type` out" in text


@pytest.mark.parametrize(
    ("command", "changes", "said"),
    [
        (
            "check", {"speculator_path": "nowhere"},
            ["recipe.yaml:", "`nowhere` holds no speculator", "expected: a folder that the checkpoint part"],
        ),
        (
            "check", {"model": {"speculator": "lstm"}, "checkpoint": [{"type": "speculator", "served_by": "vllm"}]},
            ["recipe.yaml:", "serves no speculator of the kind `lstm`", "fix: write `served_by: arctic`"],
        ),
        (
            "check", {"speculator_path": "recurrent", "checkpoint": [{"type": "speculator", "served_by": "vllm"}]},
            ["recipe.yaml:", "serves no speculator of the kind `lstm`", "fix: write `served_by: arctic`"],
        ),
        (
            "run", {"model": {"speculator_width": 20_000_000}},
            ["3 heads of the width 20000000 make a speculator of", "GiB", "the memory of this machine",
             "fix: take a smaller `speculator_width`, fewer `n_speculator_heads`"],
        ),
        (
            "run", {"tokenizer": {"name_or_path": "tokenizer"}, "data": {"overlength": "drop"}},
            ["recipe.yaml:", "the tokenizer `tokenizer` is not that of the base", "fix: leave `tokenizer` out"],
        ),
        (
            "run", {"speculator_path": "wider"},
            ["recipe.yaml:", "`wider` is made for another base (`base`), whose hidden states have the width 96",
             "expected: 64"],
        ),
    ],
    ids=["no folder", "engine", "engine of a saved one", "memory", "tokenizer", "base"],
)  # fmt: skip
def test_from_the_command_line(command: str, changes: dict[str, Any], said: list[str], folder: Path) -> None:
    """Exit code 2, with the place in the recipe; a run leaves no directory."""
    written = merged(merged(recipe(Path()), {"output_dir": "never"}), changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "400", "DS_ACCELERATOR": "cpu"}
    arguments = [sys.executable, "-m", "ptrain_cli", command, "recipe.yaml"]
    done = subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=240)
    text = " ".join(done.stderr.split())
    assert done.returncode == 2 and all(part in text for part in said), done.stderr
    assert "Traceback" not in done.stderr and not (folder / "never").exists()


@pytest.mark.parametrize(
    ("world", "zero", "bytes_each"),
    [
        (1, {}, 16),
        (4, {}, 2 + 14 / 4),
        (4, {"stage": 1}, 4 + 12 / 4),
        (4, {"stage": 3}, 4),
        (1, {"offload_optimizer": {"device": "cpu"}}, 2),
        (1, {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, 0),
        (1, {"offload_optimizer": {"device": "none"}}, 16),
    ],
)
def test_what_a_gpu_keeps_of_a_speculator(
    world: int, zero: dict[str, Any], bytes_each: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = shape("mlp", hidden_size=64, vocab_size=400)
    recipe = SimpleNamespace(
        deepspeed={"zero_optimization": zero}, micro_batch_size=1, model=SimpleNamespace(dtype="bf16")
    )
    block = deepspeed_config(recipe, world)["zero_optimization"]  # type: ignore[arg-type]
    run: Any = SimpleNamespace(device=torch.device("cuda"), world=world, recipe=recipe, zero=block)

    def check(total: float) -> None:
        there = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: there)
        check_size(run, wanted)

    check(bytes_each * wanted.parameters)
    if bytes_each:
        with pytest.raises(ModelError, match="the memory of the GPU"):
            check(bytes_each * wanted.parameters - 2)


def test_texts_that_the_base_has_no_positions_for(
    folder: Path, ptrain_tokenizer: Any, ptrain_run: Any, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {
        "n_embd": 64,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": len(ptrain_tokenizer),
    }
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=2)).save_pretrained(tmp_path / "learnt")
    ptrain_tokenizer.save_pretrained(tmp_path / "learnt")
    made = merged(recipe(folder), {"model": {"name_or_path": str(tmp_path / "learnt")}, "gen_train": True})
    made = merged(made, {"data": {"max_length": 64, "overlength": "truncate_right"}, "gen_prompt_length": 8})
    del made["output_dir"]
    with pytest.raises(WorkerFailed, match="after prompts of up to 8, and the base has learnt 64 positions"):
        ptrain_run(merged(made, {"gen_seq_length": 58}))
    ptrain_run(merged(made, {"gen_seq_length": 57}))
