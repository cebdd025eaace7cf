"""`swiftkv` against a bare loop over the dense reference, on one worker and on two."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bare_loop
import pytest
import torch
from harness import losses, metrics, run_workers
from swiftkv_made import make_teacher
from swiftkv_oracle import WEIGHED, Oracle, compare_gradients
from test_oracle import exported, token_rows

from ptrain.testing.recipes import merged
from ptrain.testing.workers import run_workers as run_in_workers

SETTINGS = {"logits_loss_temp": 1.7, "hidden_loss_mult": 0.6, "hidden_loss_layer": -2}
LAYERS = 4


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four layers with the tokenizer of the tiny model."""
    return make_teacher(tiny_model, tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def swiftkv(recipes: Any, base: Path) -> Callable[..., dict[str, Any]]:
    """Makes a recipe of `swiftkv` on ragged conversations."""

    def make(**changes: Any) -> dict[str, Any]:
        mine = {
            "type": "swiftkv",
            "model": {"name_or_path": str(base), "num_key_value_layers": 2, "key_value_group_size": 2},
            "checkpoint": [{"type": "huggingface", "save_end_of_training": True, "verify": False}],
            "epochs": 1,
        }
        return merged(recipes("sft"), merged(mine, changes))

    return make


def begun(base: Path, kept: int, size: int) -> Any:
    """A student as it begins, of which its own weights alone are trained."""
    from transformers import AutoModelForCausalLM

    from ptrain_swiftkv.models import FAMILIES
    from ptrain_swiftkv.student import begin, freeze, student_config

    teacher: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = FAMILIES["llama"](student_config(teacher.config, kept, size))
    made.load_state_dict(teacher.state_dict(), strict=False)
    begin(made)
    freeze(made)
    return made


CUTS = [(8, 1, False), (2, 4, False), (4, 2, True), (1, 8, True)]
"""Micro-batch, accumulation, and whether rows are packed."""


@pytest.mark.parametrize("workers", [1, 2])
def test_equals_the_bare_loop(workers: int, swiftkv: Any, prepared: Any, base: Path) -> None:
    """Losses, their terms and weights, however the batch is cut, packed or padded, ZeRO 0, 2 and 3, computed again or not."""
    cases = [(*cut, stage) for cut, stage in zip(CUTS, itertools.cycle([0, 3, 2, 3]), strict=False)]
    specs = [
        prepared(swiftkv(
            micro_batch_size=micro, gradient_accumulation_steps=accumulation, train_iters=5,
            data={"pack_samples": packed}, deepspeed={"zero_optimization": {"stage": stage}}, **SETTINGS,
            model={"disable_activation_checkpoint": stage != 3},
        ))
        for micro, accumulation, packed, stage in cases
    ]  # fmt: skip
    run_workers(specs, workers)
    for packed in (False, True):
        these = [(case, spec) for case, spec in zip(cases, specs, strict=True) if case[2] == packed]
        rows, steps = token_rows(these[0][1]), len(losses(these[0][1]))
        assert packed == any(len(row) > 1 for row in rows)
        model, oracle = begun(base, 2, 2), Oracle(1.7, 0.6, -2)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        expected = bare_loop.train(model, rows, batch=8 * workers, steps=steps, lr=1e-3, seed=42, parts=oracle)
        assert expected[0] > 0.1
        for case, spec in these:
            torch.testing.assert_close(losses(spec), expected, atol=1e-5, rtol=1e-6, msg=lambda m, w=case: f"{w}: {m}")
            for record, terms in zip(metrics(spec), oracle.terms, strict=True):
                assert {name: record[name] for name in terms} == pytest.approx(terms, abs=1e-5, rel=1e-6), case
            weights = exported(spec)
            for name, value in model.named_parameters():
                assert (weights[name] - value).abs().max() <= 1e-5, (case, name)
                assert value.requires_grad == ("_swiftkv." in name) == (not value.equal(start[name]))


def test_losses_and_gradients_equal_the_dense_reference(swiftkv: Any, tmp_path: Path) -> None:
    """To 1e-6, of the first step, and each part of the loss by itself; in a process of its own, whose group it is."""
    recipes = []
    for weight, temperature, layer in WEIGHED:
        settings = {"hidden_loss_mult": weight, "logits_loss_temp": temperature, "hidden_loss_layer": layer}
        recipes.append(swiftkv(micro_batch_size=3, output_dir=str(tmp_path / f"run-{layer}"), **settings))
    run_in_workers(compare_gradients, recipes, log=tmp_path / "worker.log")


@pytest.mark.parametrize("kept", [LAYERS, LAYERS - 1])
def test_with_nothing_to_learn_losses_and_gradients_are_0(kept: int, swiftkv: Any, prepared: Any) -> None:
    """Exactly, with every layer kept, and at the beginning with all but one."""
    model = {"num_key_value_layers": kept, "key_value_group_size": None}
    spec = prepared(
        swiftkv(
            model=model,
            micro_batch_size=4,
            eval_at_start=True,
            optimizer={"weight_decay": 0.0},
            data={"train_eval_split": [0.8, 0.2]},
        )
    )
    run_workers([spec], 1)
    records = [json.loads(line) for line in (spec.parent / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval/loss" in record]
    for record in metrics(spec):
        assert [record[name] for name in ("loss", "loss/logits", "loss/hidden", "grad_norm")] == [0.0] * 4
    assert evaluated[0]["eval/loss"] == 0.0 and evaluated[0]["eval/teacher_agreement"] == 1.0
