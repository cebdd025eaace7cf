"""`dpo` against the bare loop and closed forms: losses, weights and what is logged; the reference's log-probabilities."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bare_loop
import pytest
import torch
import yaml
from harness import losses, metrics, run, run_workers
from safetensors.torch import load_file, save_file
from test_oracle import exported, token_rows

import ptrain
from ptrain.testing.recipes import merged
from ptrain.testing.rows import conversations, write_rows
from ptrain.testing.workers import WorkerFailed

BETA = 0.3
CUTS = [(8, 1), (2, 4)]
SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "smoothed, by length": {"label_smoothing": 0.1, "length_normalised": True},
    "ipo": {"loss_type": "ipo"},
}
LOGGED = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "kl"
)  # fmt: skip


def pairs(count: int) -> Iterator[dict[str, Any]]:
    """Ragged pairs."""
    for better, worse in zip(conversations(count), conversations(count, seed=9), strict=True):
        yield {"prompt": better["messages"][:1], "chosen": better["messages"][1:2], "rejected": worse["messages"][1:2]}


@pytest.fixture
def dpo(recipes: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes a recipe of `dpo` on ragged pairs."""
    file = write_rows(tmp_path / "pairs.jsonl", pairs(19))

    def make(**changes: Any) -> dict[str, Any]:
        base = {
            "data": {"sources": [{"type": "jsonl", "path": str(file)}], "max_length": 256},
            "tokenizer": {"chat_template": "chatml"},
            "checkpoint": [{"type": "huggingface", "save_end_of_training": True, "verify": False}],
            "beta": BETA,
        }
        return recipes("dpo", **merged(base, changes))

    return make


class Oracle:
    """The loss of a pair and what is logged of it, by the formulas of the papers, one pair at a time."""

    def __init__(self, reference: Any, keys: dict[str, Any]) -> None:
        self.reference, self.ipo = reference, keys.get("loss_type") == "ipo"
        self.mean = keys.get("length_normalised", self.ipo)
        self.smoothing = keys.get("label_smoothing", 0.0)
        self.logged: list[dict[str, float]] = []

    def score(self, model: Any, document: bare_loop.Document) -> torch.Tensor:
        answer = sum(label != -100 for label in document[1][1:])
        return -bare_loop.loss_sum(model, document) / (answer if self.mean else 1)

    def __call__(self, model: Any, rows: bare_loop.Rows) -> Iterator[torch.Tensor]:
        step = dict.fromkeys(LOGGED, 0.0)
        for better, worse in rows:
            chosen, rejected = self.score(model, better), self.score(model, worse)
            with torch.no_grad():
                before = self.score(self.reference, better), self.score(self.reference, worse)
            gains = chosen - before[0], rejected - before[1]
            margin = gains[0] - gains[1]
            if self.ipo:
                loss = (margin - 1 / (2 * BETA)) ** 2
            else:
                right = torch.log(torch.sigmoid(BETA * margin))
                wrong = torch.log(1 - torch.sigmoid(BETA * margin))
                loss = -(1 - self.smoothing) * right - self.smoothing * wrong
            values = (
                BETA * gains[0], BETA * gains[1], BETA * margin, margin > 0, chosen, rejected, (gains[0] + gains[1]) / 2
            )  # fmt: skip
            for name, value in zip(LOGGED, values, strict=True):
                step[name] += float(value) / len(rows)
            yield loss / len(rows)
        self.logged.append(step)


@pytest.mark.parametrize("workers", [1, 2])
def test_equals_the_bare_loop(workers: int, dpo: Any, prepared: Any, tiny_model: Path) -> None:
    """Losses, weights and logged values, for each loss, however the batch is cut, with either reference, ZeRO 0 to 3."""
    from transformers import AutoModelForCausalLM

    kinds = itertools.cycle([("cached", 0), ("online", 3), ("online", 0), ("cached", 3), ("cached", 2)])
    cases = [(name, cut, *next(kinds)) for name, cut in itertools.product(SETTINGS, CUTS)]
    specs = [
        prepared(dpo(
            micro_batch_size=cut[0], gradient_accumulation_steps=cut[1], reference=reference,
            deepspeed={"zero_optimization": {"stage": stage}}, **SETTINGS[name],
        ))
        for name, cut, reference, stage in cases
    ]  # fmt: skip
    run_workers(specs, workers)
    rows = token_rows(specs[0])
    assert all(len(row) == 2 for row in rows)
    for name in SETTINGS:
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        oracle = Oracle(copy.deepcopy(model).eval(), SETTINGS[name])
        steps = len(losses(specs[0]))
        expected = bare_loop.train(model, rows, batch=8 * workers, steps=steps, lr=1e-3, seed=42, parts=oracle)
        if name == "sigmoid":
            assert expected[0] == pytest.approx(math.log(2), abs=1e-6)
        for case, spec in zip(cases, specs, strict=True):
            if case[0] != name:
                continue
            torch.testing.assert_close(losses(spec), expected, atol=1e-5, rtol=1e-6, msg=lambda m, w=case: f"{w}: {m}")
            for record, logged in zip(metrics(spec), oracle.logged, strict=True):
                found = {key: record[key] for key in LOGGED}
                assert found == pytest.approx(logged, abs=2e-5, rel=1e-6), case
            weights = exported(spec)
            for key, value in model.state_dict().items():
                assert (weights[key] - value).abs().max() <= 1e-5, (case, key)


def test_cached_and_online_reference_agree(dpo: Any, prepared: Any) -> None:
    """To 1e-6, on two workers under ZeRO-3, for training and evaluation."""
    changes = {
        "micro_batch_size": 2, "deepspeed": {"zero_optimization": {"stage": 3}}, "eval_interval": 2,
        "data": {"train_eval_split": [0.7, 0.3]},
    }  # fmt: skip
    specs = [prepared(dpo(reference=reference, **changes)) for reference in ("cached", "online")]
    run_workers(specs, 2)
    cached, online = (
        [json.loads(line) for line in (spec.parent / "metrics.jsonl").read_text().splitlines()] for spec in specs
    )
    evaluations = 0
    for one, other in zip(cached, online, strict=True):
        names = {name for name in one if name.removeprefix("eval/") in ("loss", "rewards/margins", "kl")}
        evaluations += any(name.startswith("eval/") for name in names)
        assert {name: one[name] for name in names} == pytest.approx(
            {name: other[name] for name in names}, abs=1e-6, rel=1e-6
        )
    assert evaluations >= 2


COMPUTED = "log-probabilities of"


def test_the_reference_is_computed_once(dpo: Any, tmp_path: Path, tiny_model: Path) -> None:
    """A second run and a resumed one use what the first computed; other weights, or other rows, have their own."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "dpo.yaml"
    path.write_text(yaml.safe_dump(dpo(
        model={"name_or_path": str(model)}, micro_batch_size=4, checkpoint=[{"type": "deepspeed"}],
        data={"cache_dir": str(tmp_path / "cache")},
    )))  # fmt: skip

    def said(*arguments: str, code: int = 0) -> str:
        found, out, err = run("run", path, *arguments)
        assert found == code, err
        return out + err

    assert COMPUTED in said("-o", f"output_dir={tmp_path / 'whole'}")
    assert COMPUTED not in said("-o", f"output_dir={tmp_path / 'cut'}", "-o", "exit_iteration_this_run=4")
    (file,) = (tmp_path / "cache").glob("*.reference.safetensors")
    file.unlink()
    assert COMPUTED not in said("-o", f"output_dir={tmp_path / 'cut'}", "--resume")
    assert not file.exists(), "a run that goes on needs no other file than its own"
    assert losses(tmp_path / "cut" / "run.json") == losses(tmp_path / "whole" / "run.json")

    (tmp_path / "gone").mkdir()
    said("-o", f"output_dir={tmp_path / 'gone'}", "-o", "exit_iteration_this_run=2")
    (tmp_path / "gone" / "reference.safetensors").unlink()
    message = said("-o", f"output_dir={tmp_path / 'gone'}", "--resume", code=2)
    assert "reference.safetensors` is gone" in message and "--restart" in message

    code = tmp_path / "code.py"
    code.write_text(
        "import ptrain\n\n@ptrain.hookimpl(wrapper=True)\ndef create_model(run, config):\n    return (yield)\n"
    )
    assert COMPUTED in said("-o", f"output_dir={tmp_path / 'code'}", "--code", str(code)), "it may change the model"
    weights = model / "model.safetensors"
    save_file({name: value + 1e-3 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert COMPUTED in said("-o", f"output_dir={tmp_path / 'other'}")


def test_a_reference_of_another_model_is_not_taken(dpo: Any, prepared: Any) -> None:
    """The first loss is log 2 whatever came before: other weights from another seed, or numbers rounded otherwise, or
    a file of a run that began with other weights and ended before its first checkpoint."""
    drawn = {"model": {"hf_config_kwargs": {"num_hidden_layers": 1}}, "train_iters": 1, "epochs": 0}
    rounded = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 0}}
    specs = [prepared(dpo(**drawn, **more)) for more in ({"seed": 1}, {"seed": 2}, {"seed": 2, "deepspeed": rounded})]
    specs.append(prepared(dpo(**drawn, seed=3)))
    save_file({"train": torch.randn(19, 2)}, specs[-1].parent / "reference.safetensors")
    run_workers(specs, 1)
    assert [losses(spec)[0] for spec in specs] == pytest.approx([math.log(2)] * 4, abs=1e-6)


def test_the_model_without_its_adapter_is_the_reference(dpo: Any, prepared: Any) -> None:
    """Equal to the cached one: losses and what is logged to 1e-5, with dropout, ZeRO 0, 2 and 3, on two workers."""
    adapter = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear", "lora_dropout": 0.2}
    specs = [
        prepared(dpo(
            model={"peft_config": adapter}, micro_batch_size=2, reference=reference, optimizer={"lr": 1e-2},
            deepspeed={"zero_optimization": {"stage": stage}},
        ))
        for stage in (0, 2, 3) for reference in ("cached", "adapter_off")
    ]  # fmt: skip
    run_workers(specs, 2)
    for cached, off in zip(specs[::2], specs[1::2], strict=True):
        assert losses(off) == pytest.approx(losses(cached), abs=1e-5, rel=1e-5)
        for one, other in zip(metrics(cached), metrics(off), strict=True):
            assert {key: one[key] for key in LOGGED} == pytest.approx({key: other[key] for key in LOGGED}, abs=2e-5)
    assert metrics(specs[0])[-1]["rewards/margins"] != 0


def test_an_adapter_of_sft_goes_on_in_dpo(dpo: Any, recipes: Any, prepared: Any) -> None:
    """The reference is the model with that adapter, not without it."""
    saves = {"checkpoint": [{"type": "huggingface", "save_end_of_training": True}]}
    sft = prepared(recipes(model={"peft_config": {"r": 4, "target_modules": "all-linear"}}, epochs=1, **saves))
    run_workers([sft], 1)
    spec = prepared(dpo(model={"name_or_path": str((sft.parent / "model" / "latest").resolve())}, train_iters=2))
    run_workers([spec], 1)
    first = metrics(spec)[0]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6) and first["loss"] == pytest.approx(math.log(2))
    with pytest.raises(ptrain.RecipeError, match="gives the model no adapter"):
        prepared(dpo(reference="adapter_off"))
    drawn = {"peft_config": {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}}
    spec = prepared(dpo(model=drawn, reference="adapter_off", train_iters=2))
    with pytest.raises(WorkerFailed, match="the adapter changes the model before its first step"):
        run_workers([spec], 1)
