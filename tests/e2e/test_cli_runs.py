"""The real command: runs, interruptions, refusals."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from harness import finish, losses, run, start, uninterrupted, wait_for_steps

from ptrain.errors import DataError
from ptrain.testing.rows import conversations, write_rows


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_saves_and_resume_is_exact(workers: int, recipe_file: Any, tmp_path: Path) -> None:
    """Exit code 75, a checkpoint of that very step, and a resumed run that equals the uninterrupted one."""
    whole = recipe_file("whole", train_iters=60)
    uninterrupted(whole, workers)
    cut = recipe_file("cut", train_iters=60)
    process = start("run", cut, "--workers", str(workers))
    wait_for_steps(tmp_path / "cut" / "metrics.jsonl", 5, process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 75, (out, err)
    done = len(losses(tmp_path / "cut" / "run.json"))
    assert 5 <= done < 60
    assert (tmp_path / "cut" / "checkpoints" / "latest").resolve().name == f"step-{done:08d}"
    assert f"go on with: ptrain run {cut} --workers {workers} --resume" in out
    code, out, err = run("run", cut, "--workers", str(workers), "--resume")
    assert code == 0, err
    assert "done: 60/60 steps" in out and str(tmp_path / "cut") in out
    assert losses(tmp_path / "cut" / "run.json") == losses(tmp_path / "whole" / "run.json")


def test_the_export_loads_and_generates(recipe_file: Any, tmp_path: Path) -> None:
    """`AutoModelForCausalLM` and `AutoTokenizer` load what the closing line names; it is finite and generates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, err = run("run", recipe_file(train_iters=5))
    assert code == 0, err
    folder = out.strip().splitlines()[-1].split("model: ")[1].split(";")[0].strip()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    made = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > ids.shape[1]
    config = json.loads((Path(folder) / "config.json").read_text())
    assert "ptrain" not in json.dumps(config)


def test_a_used_run_directory_is_refused_then_restarted(recipe_file: Any, tmp_path: Path) -> None:
    """Exit code 2 and a message that names the ways on; `--restart` keeps the old one."""
    recipe = recipe_file(train_iters=3)
    assert run("run", recipe)[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    code, _, err = run("run", recipe)
    assert code == 2 and "--resume" in err and "--restart" in err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert run("run", recipe, "--restart")[0] == 0
    assert (tmp_path / "run.1" / "metrics.jsonl").read_text() == before


def test_rows_that_can_not_be_used_are_told_before_anything_is_written(
    recipes: Any, prepared: Any, tmp_path: Path
) -> None:
    split = {"mask_inputs": False, "train_eval_split": [0.8, 0.2]}
    with pytest.raises(DataError, match="hold no question for `exact_match`"):
        prepared(recipes(data=split, evaluation=["exact_match"]), "run")
    rows = [{"input_ids": [1, at, 2], "labels": [-100, at, 2]} for at in (5, 9999, 7)]
    ready = {"type": "jsonl", "path": str(write_rows(tmp_path / "tokens.jsonl", rows)), "process": False}
    with pytest.raises(DataError, match=r"tokens\.jsonl:2: there is a token 9999, and the model has"):
        prepared(recipes(data={"sources": [ready]}), "run")
    assert not (tmp_path / "run").exists()


def test_folders_from_the_environment(recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a variable holds counts in keys that belong to no part, and is written nowhere."""
    there = tmp_path / "canary"
    at = "${env:THERE}"
    data, logger = {"cache_dir": f"{at}/cache"}, {"output_dir": f"{at}/logs"}
    recipe = recipe_file(
        output_dir=f"{at}/run", train_iters=2, data=data, logger=logger, checkpoint=[],
        train_log_metrics_path=f"{at}/steps.jsonl", kill_switch_path=f"{at}/halt",
    )  # fmt: skip
    monkeypatch.delenv("THERE", raising=False)
    assert run("check", recipe, cwd=tmp_path)[0] == 0
    code, _, err = run("run", recipe, cwd=tmp_path)
    assert code == 2 and "`output_dir` refers to the environment variable `THERE`, which is not set" in err
    monkeypatch.setenv("THERE", str(there))
    code, _, err = run("run", recipe, "--workers", 2, cwd=tmp_path)
    assert code == 0, err
    assert {one.name for one in there.iterdir()} == {"run", "cache", "logs", "steps.jsonl"}
    assert not [*tmp_path.glob("*env*")] and at in (there / "run" / "run.json").read_text()
    before = (there / "steps.jsonl").read_text()
    (there / "halt").touch()
    code, out, err = run("run", recipe, "--restart", cwd=tmp_path)
    assert code == 75, err
    assert "holds metrics already, and is now called `steps.jsonl.1`" in out
    assert (there / "steps.jsonl.1").read_text() == before and before.count('"loss"') == 2


def test_the_kill_switch_stops_and_saves(recipe_file: Any, tmp_path: Path) -> None:
    """A file ends the run like a signal does; until then no other takes its directory."""
    process = start("run", recipe_file(train_iters=100_000))
    wait_for_steps(tmp_path / "run" / "metrics.jsonl", 3, process)
    code, _, err = run("run", tmp_path / "run.yaml", "--restart")
    assert code == 2 and f"another process ({process.pid} on " in err and "set another `output_dir`" in err, err
    assert not (tmp_path / "run.1").exists() and process.poll() is None
    (tmp_path / "run" / "stop").touch()
    code, _, err = finish(process)
    assert code == 75, err
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()
    done = len(losses(tmp_path / "run" / "run.json"))
    code, out, err = run("run", tmp_path / "run.yaml", "--resume", "-o", f"exit_iteration={done + 5}")
    assert code == 0 and f"{done + 5}/" in out, "the switch ended the run before, and is no more"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_an_evaluation_too(workers: int, recipe_file: Any, tmp_path: Path) -> None:
    """It may last longer than the time that a batch system gives; it is made again after the resume."""
    many = write_rows(tmp_path / "many.jsonl", conversations(2000))
    recipe = recipe_file(
        data={"eval_sources": [{"type": "jsonl", "path": str(many)}]},
        evaluation=[{"type": "exact_match", "batch_size": 1}],
        eval_at_start=True,
        train_iters=2,
    )
    process = start("run", recipe, "--workers", str(workers))
    assert process.stdout is not None
    assert any("optimizer steps of" in line for line in process.stdout)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    assert "stopping:" in err
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step-00000000"
    assert "eval/" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_damaged_checkpoints_alone_are_not_resumed_from(recipe_file: Any, tmp_path: Path) -> None:
    """The run does not silently begin anew; one good checkpoint is enough to go on."""
    recipe = recipe_file(train_iters=3, checkpoint=[{"type": "deepspeed", "save_every_n_steps": 1}])
    code, out, _ = run("run", recipe, "-o", "exit_iteration=2")
    assert code == 0 and "-o exit_iteration=2 --resume -o exit_iteration=0" in out, "the hint has to lead on"
    folder, metrics = tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_text()
    (folder / "step-00000002" / "state.json").write_text("{}")
    kept = (folder / "step-00000001" / "state.json").read_text()
    (folder / "step-00000001" / "state.json").write_text("")
    code, _, err = run("run", recipe, "--resume")
    assert code == 2 and "none of the 2 checkpoints" in err and "step-00000002/state.json: truncated" in err, err
    assert metrics.read_text() == before
    (folder / "step-00000001" / "state.json").write_text(kept)
    code, out, err = run("run", recipe, "--resume")
    assert code == 0, err
    assert "(step 1)" in out and "using" in err and metrics.read_text().startswith(before.splitlines()[0])
    assert len(losses(tmp_path / "run" / "run.json")) == 3


def test_a_new_run_does_not_write_among_the_checkpoints_of_another(recipe_file: Any, tmp_path: Path) -> None:
    """A step of the same number would be taken for its own; the same recipe may go on from there."""
    apart = [{"type": "deepspeed", "save_every_n_steps": 1, "output_dir": str(tmp_path / "apart")}]
    recipe = recipe_file(train_iters=3, checkpoint=apart)
    assert run("run", recipe, "-o", "exit_iteration=2")[0] == 0
    code, _, err = run("run", recipe, "--restart")
    assert code == 2 and "already holds checkpoints, such as `step-00000002`" in err, err
    assert not (tmp_path / "run.1").exists()
    inside = ("-o", f"checkpoint.0.output_dir={tmp_path / 'run' / 'inside'}")
    assert run("run", recipe, "--restart", *inside)[0] == 0
    assert run("run", recipe, "--restart", *inside)[0] == 0, "what is renamed is not in the way"
    elsewhere = ("run", recipe, "-o", f"output_dir={tmp_path / 'other'}", "--resume")
    code, _, err = run(*elsewhere, "-o", "seed=3")
    assert code == 2 and "belongs to a run of another recipe" in err, err
    code, out, err = run(*elsewhere)
    assert code == 0 and "(step 2)" in out, err


@pytest.mark.parametrize(
    ("config", "data", "says"),
    [
        ({"model_type": "gemma2"}, {}, "write `attn_implementation: eager`"),
        ({"model_type": "mamba"}, {"pack_samples": True}, "layers of the kind ['linear_attention']"),
        (
            {"model_type": "llama", "num_attention_heads": 5, "hidden_size": 64},
            {},
            "The hidden size (64) is not a multiple of the number of attention heads (5)",
        ),
    ],
)
def test_what_the_model_can_not_do_is_said_before_workers_start(
    config: dict[str, Any], data: dict[str, Any], says: str, recipe_file: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """Exit code 2, and no run directory."""
    model = {"name_or_path": "", "config": config}
    code, _, err = run("run", recipe_file(model=model, data=data, tokenizer={"name_or_path": str(tiny_model)}))
    assert code == 2, err
    assert says in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_other_data_is_not_resumed_with(recipe_file: Any, tmp_path: Path) -> None:
    """The position in the data would mean other rows: as many rows, and one word of one of them changed."""
    rows = write_rows(tmp_path / "rows.jsonl", conversations(29))
    recipe = recipe_file(data={"sources": [{"type": "jsonl", "path": str(rows)}]}, train_iters=3)
    assert run("run", recipe, "-o", "exit_iteration=2", "-o", "checkpoint.0.save_every_n_steps=1")[0] == 0
    text = rows.read_text()
    rows.write_text(text.replace("one", "two", 1))
    code, _, err = run("run", recipe, "--resume")
    assert code == 2 and "made with other training data" in err, err
    rows.write_text(text)
    assert run("run", recipe, "--resume")[0] == 0
