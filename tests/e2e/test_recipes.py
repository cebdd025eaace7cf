"""The recipes that ship with the project, run as their first lines say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import losses, metrics

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "sft" / "gsm8k_train.messages.jsonl.gz"


def ptrain(*arguments: str | Path, threads: int = 1, timeout: float = 900) -> str:
    """The output of the command, which has to succeed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "ptrain_cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(1800)
def test_the_quickstart_learns_its_tasks(tmp_path: Path) -> None:
    """Near 0 % before, at least 90 % after, on questions that are not in the training data; the model loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = ["-o", f"output_dir={tmp_path / 'run'}", "-o", f"data.cache_dir={tmp_path / 'cache'}"]
    out = ptrain("run", "recipes/quickstart.yaml", *where, threads=2)
    before, after = (float(x) for x in re.findall(r"exact_match (\d+\.\d)%", out))
    assert before <= 5 and after >= 90, out
    assert out.count("What is") >= 2 and "done: 2500/2500 steps" in out and "next:" in out
    folder = (tmp_path / "run" / "model" / "latest").resolve()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = [{"role": "user", "content": "Write 3 March 2011 in digits."}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(made, skip_special_tokens=True).strip() == "2011-03-03"


def test_the_quickstart_asks_nothing_that_it_has_trained_on(tmp_path: Path) -> None:
    """No evaluation question is a training question."""
    from ptrain.data.tasks import generate, task_names

    sections = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())["data"]
    (train,), (asked,) = sections["sources"], sections["eval_sources"]
    seen = {row["messages"][0]["content"] for row in generate(task_names(), 40_000, train["seed"], "train")}
    questions = [row["messages"][0]["content"] for row in generate(task_names(), asked["count"], asked["seed"], "eval")]
    assert len(seen) > 30_000 and len(questions) == 360 and not seen & set(questions)


@pytest.mark.skipif(not GSM8K.exists(), reason="the folder shared/data with GSM8K is not beside the repository")
def test_gsm8k_on_two_workers_interrupted_resumed_exported(tmp_path: Path) -> None:
    """The recipe, shortened: ZeRO-2 and packing on two workers; the loss falls, the export generates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    overrides = {
        "data.sources.0.path": GSM8K, "data.sources.0.sample_count": 600, "output_dir": tmp_path / "run",
        "data.cache_dir": tmp_path / "cache", "train_iters": 24, "eval_interval": 12,
        "checkpoint.0.save_every_n_steps": 8,
    }  # fmt: skip
    common = ["recipes/sft-gsm8k.yaml", "--workers", "2"]
    common += [part for key, value in overrides.items() for part in ("-o", f"{key}={value}")]
    out = ptrain("run", *common, "-o", "exit_iteration_this_run=10")
    assert "--resume" in out
    ptrain("run", *common, "--resume")
    spec = tmp_path / "run" / "run.json"
    assert [record["step"] for record in metrics(spec)] == list(range(1, 25))
    assert sum(losses(spec)[-4:]) < 0.9 * sum(losses(spec)[:4])
    records = [json.loads(line) for line in (spec.parent / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record["eval/loss"] for record in records if "eval/loss" in record]
    assert len(evaluated) >= 3 and evaluated[-1] < evaluated[1] < evaluated[0]
    folder = (tmp_path / "run" / "model" / "latest").resolve()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many are 2 and 3?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    assert model.generate(**ids, max_new_tokens=8, do_sample=False).shape[1] > ids["input_ids"].shape[1]
