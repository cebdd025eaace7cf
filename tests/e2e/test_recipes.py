"""The recipes that ship with the project, run as their first lines say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import losses, metrics

ROOT = Path(__file__).parents[2]
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
SHAPES = {
    "llama-3.1-8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3.1-70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Of the models that recipes name, which are not here."""
GSM8K = ROOT.parent / "shared" / "data" / "sft" / "gsm8k_train.messages.jsonl.gz"


def ptrain(*arguments: str | Path, timeout: float = 900) -> str:
    """The output of the command, which has to succeed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ptrain_cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(1800)
def test_the_quickstart_learns_its_tasks(tmp_path: Path) -> None:
    """Near 0 % before, at least 90 % after, on questions that are not in the training data; the model loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = ["-o", f"output_dir={tmp_path / 'run'}", "-o", f"data.cache_dir={tmp_path / 'cache'}"]
    out = ptrain("run", "recipes/quickstart.yaml", *where)
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


@pytest.mark.parametrize(
    ("name", "workers", "trained", "most"),
    [
        # Queries of every later layer, keys and values of every group, and a norm.
        ("llama-3.1-8b", 8, 16 * (4096 * 4096 + 2 * 4096 * 1024) + 4096, 30),
        ("llama-3.1-70b", 64, 40 * (8192 * 8192 + 2 * 8192 * 1024) + 8192, 40),
        ("qwen2.5-7b", 8, 7 * ((3584 + 1) * 3584 + 2 * (3584 + 1) * 512) + 3584, 30),
    ],
)
def test_the_plan_of_swiftkv_at_full_size(name: str, workers: int, trained: int, most: float, tmp_path: Path) -> None:
    """The recipe fits the machines that it names, without any of it downloaded: GiB of a worker with 80 GB."""
    from ptrain.plan.devices import Device
    from ptrain.plan.forecast import forecast
    from ptrain.recipe.load import load_recipe

    path, shape = ROOT / "recipes" / f"swiftkv-{name}.yaml", SHAPES[name] | {"max_position_embeddings": 8192}
    model = load_recipe(path).recipe.model
    assert model.name_or_path.lower().endswith(f"{name}-instruct")
    stands_in = [
        f"model={json.dumps({'config': shape, 'num_key_value_layers': model.num_key_value_layers})}",
        f"tokenizer={json.dumps({'type': 'train', 'vocab_size': shape['vocab_size']})}",
        f"data.cache_dir={tmp_path}",
    ]
    plan = forecast(load_recipe(path, stands_in), tmp_path / "run", workers, Device("h100-80gb", "cuda", 80 * 10**9))
    assert plan.parameters is not None and plan.parameters.trainable == trained
    assert plan.memory is not None and 10 < plan.memory.peak / 2**30 < most


SHAPES |= {
    "qwen3-32b": {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "head_dim": 128,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": False,
    },
}  # fmt: skip
LONG = sorted((ROOT / "recipes").glob("long-*.yaml"))


def planned_long(path: Path, folder: Path, **shape: Any) -> Any:
    """The plan of a recipe for long rows, on the devices in its name, of a model of its shape."""
    from ptrain.plan.devices import Device
    from ptrain.plan.forecast import forecast
    from ptrain.recipe.load import load_recipe

    name, workers = path.stem.removeprefix("long-").rsplit("-", 1)
    written = load_recipe(path).recipe
    assert name in written.model.name_or_path.lower()
    size = written.plugins["sequence-parallel"].model_dump()["size"]
    assert size == int(workers) and written.plugins["sequence-parallel"].model_dump()["across_nodes"] == (size > 8)
    config = SHAPES[name] | {"max_position_embeddings": written.data.max_length} | shape
    stands_in = [
        f"model={json.dumps({'config': config, 'disable_activation_checkpoint': False})}",
        f"tokenizer={json.dumps({'type': 'train', 'vocab_size': config['vocab_size']})}",
        f"data.cache_dir={folder}",
    ]
    plan = forecast(load_recipe(path, stands_in), folder / "run", size, Device("h100-80gb", "cuda", 80 * 10**9))
    assert plan.memory is not None and plan.memory.columns == -(-plan.memory.length // size)
    return plan


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem.endswith("8b-8") else pytest.mark.exhaustive) for path in LONG],
    ids=lambda path: path.stem,
)
def test_recipes_for_long_rows_are_planned_in_small(path: Path, tmp_path: Path) -> None:
    """Two layers of the model, one tile an MLP: everything that the recipe says goes together."""
    plan = planned_long(path, tmp_path, num_hidden_layers=2, hidden_size=2048, head_dim=32)
    assert plan.memory.stage == 3 and plan.memory.host > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", LONG, ids=lambda path: path.stem)
def test_recipes_for_long_rows_fit(path: Path, tmp_path: Path) -> None:
    """At full size, as their comments say."""
    plan = planned_long(path, tmp_path)
    assert plan.memory.share(plan.device, 1) <= 0.9 and plan.longest >= plan.memory.length


def gsm8k(folder: Path, **overrides: object) -> list[str | Path]:
    """The arguments that take GSM8K from its file, and put everything into `folder`."""
    if not GSM8K.exists():
        pytest.skip("the folder shared/data with GSM8K is not beside the repository")
    keys = {
        "data.sources.0.path": GSM8K, "data.sources.0.sample_count": 600, "output_dir": folder,
        "data.cache_dir": folder.parent / "cache", **overrides,
    }  # fmt: skip
    return ["--workers", "2", *(part for key, value in keys.items() for part in ("-o", f"{key}={value}"))]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the recipe for GSM8K, shortened, interrupted and resumed."""
    folder = tmp_path_factory.mktemp("gsm8k") / "run"
    shortened = {"train_iters": 24, "eval_interval": 12, "checkpoint.0.save_every_n_steps": 8}
    common = ["recipes/sft-gsm8k.yaml", *gsm8k(folder, **shortened)]
    out = ptrain("run", *common, "-o", "exit_iteration_this_run=10")
    assert "--resume" in out
    ptrain("run", *common, "--resume")
    return folder


def evaluations(folder: Path, name: str) -> list[float]:
    """What the evaluations of a run recorded, in order."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[f"eval/{name}"] for record in records if f"eval/{name}" in record]


def test_gsm8k_on_two_workers_interrupted_resumed_exported(fine_tuned: Path) -> None:
    """ZeRO-2 and packing on two workers; the loss falls, the export generates."""
    spec = fine_tuned / "run.json"
    assert [record["step"] for record in metrics(spec)] == list(range(1, 25))
    assert sum(losses(spec)[-4:]) < 0.9 * sum(losses(spec)[:4])
    evaluated = evaluations(fine_tuned, "loss")
    assert len(evaluated) >= 3 and evaluated[-1] < evaluated[1] < evaluated[0]
    generates(fine_tuned / "model" / "latest")


def test_a_student_for_gsm8k(fine_tuned: Path, tmp_path: Path) -> None:
    """The recipe, shortened, on the model of the other one: it comes nearer to it on rows that neither has seen."""
    folder = tmp_path / "student"
    changes = {
        "model.name_or_path": (fine_tuned / "model" / "latest").resolve(),
        "train_iters": 12,
        "eval_interval": 12,
    }
    ptrain("run", "recipes/swiftkv-gsm8k.yaml", *gsm8k(folder, **changes))
    divergences, agreements = evaluations(folder, "loss/logits"), evaluations(folder, "teacher_agreement")
    assert divergences[-1] < divergences[0] / 2
    assert agreements[-1] > agreements[0]
    generates(folder / "model" / "latest")


def generates(link: Path) -> None:
    """The exported model answers, whatever that is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ptrain_swiftkv.models  # noqa: F401 - so that transformers knows them

    folder = link.resolve()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many are 2 and 3?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    assert model.generate(**ids, max_new_tokens=8, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_a_speculator_for_gsm8k(fine_tuned: Path, tmp_path: Path) -> None:
    """The recipe, shortened, on the model of the other one: heads get better, and decoding with them is the same text."""
    from safetensors.torch import load_file

    folder = tmp_path / "heads"
    changes = {"model.name_or_path": (fine_tuned / "model" / "latest").resolve(), "train_iters": 16, "eval_interval": 8}
    ptrain(
        "run", "recipes/speculator-gsm8k.yaml", *gsm8k(folder, **changes),
        "-o", "evaluation.1.count=2", "-o", "evaluation.1.max_new_tokens=32",
    )  # fmt: skip
    assert sum(losses(folder / "run.json")[-4:]) < 0.9 * sum(losses(folder / "run.json")[:4])
    for head in (1, 2, 3):
        found = evaluations(folder, f"accuracy/head{head}")
        assert found[-1] > found[0] + 0.01
    assert evaluations(folder, "acceptance_length")[-1] > evaluations(folder, "acceptance_length")[0]
    assert evaluations(folder, "speculative/tokens_per_pass")[-1] >= 1
    saved = folder / "speculator" / "latest"
    assert json.loads((saved / "config.json").read_text())["base_model_archs"] == ["LlamaForCausalLM"]
    assert load_file(saved / "model.safetensors")["head.0.weight"].shape == (4096, 256)


BASES = {
    "speculator-llama-3.1-8b": (4096, 128_256, {"model_type": "llama", "num_hidden_layers": 32}),
    "speculator-llama-3.1-70b": (8192, 128_256, {"model_type": "llama", "num_hidden_layers": 80}),
    "speculator-qwen2.5-7b": (3584, 152_064, {"model_type": "qwen2", "num_hidden_layers": 28}),
}
"""By recipe, the width and the vocabulary of its base, and what else its configuration says."""


@pytest.mark.parametrize("name", BASES)
def test_full_size_speculators_are_planned(name: str, tmp_path: Path) -> None:
    """From the configuration of the base alone: what is trained is counted, and fits on 8 GPUs."""
    from ptrain.plan.devices import find
    from ptrain.plan.forecast import forecast
    from ptrain.recipe.load import load_recipe

    hidden, vocabulary, keys = BASES[name]
    size = {"hidden_size": hidden, "intermediate_size": 7 * hidden // 2, "vocab_size": vocabulary}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": 4}
    written = {**keys, **size, **heads, "tie_word_embeddings": False, "max_position_embeddings": 32_768}
    (tmp_path / "config.json").write_text(json.dumps(written))
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [f"model.name_or_path={tmp_path}"])
    made = forecast(recipe, tmp_path / "run", 8, find("h100-80gb"))
    assert made.parameters is not None and made.memory is not None and made.steps is not None
    if name == "speculator-qwen2.5-7b":
        trained = 3 * (2 * vocabulary * 4096 + 2 * 4096) + 4096 * hidden + 2 * 4096**2
    else:
        trained = 2 * vocabulary * 4096 + 4 * (4096 * hidden + 4096**2) + 4 * 4096
        assert made.steps.samples == 2048
    assert made.parameters.trainable == trained and made.steps.total == 3000
    assert made.memory.share(made.device, 8) < 0.9


def test_full_size_speculators_are_planned_without_their_base() -> None:
    """By the command, which asks nobody: what is known is told."""
    out = ptrain("plan", "recipes/speculator-llama-3.1-70b.yaml", "--workers", "8", "--device", "h100-80gb")
    assert "3,000 optimizer steps of 2,048 samples" in out and "memory not known" in out
