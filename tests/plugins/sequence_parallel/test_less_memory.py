"""Whole runs with tiles and offloaded activations are the runs without, and their switches do what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import run_workers

from ptrain.testing.recipes import Material
from ptrain.testing.runs import prepare

CASES: dict[str, dict[str, Any]] = {
    "tiles": {"tiled_mlp": 7, "tiled_loss": 5, "offload_activations": True},
    "whole logits": {"tiled_mlp": False, "tiled_loss": False, "offload_activations": False},
}


def prepared(material: Material, folder: Path, **keys: Any) -> Path:
    """Three steps of four rows and an evaluation, the layers computed again; with the feature where there are `keys`."""
    return prepare(
        material.recipe(
            "sft", model={"disable_activation_checkpoint": False}, train_iters=3, eval_at_start=True,
            data={"train_eval_split": [0.8, 0.2]}, micro_batch_size=2, gradient_accumulation_steps=2,
            plugins={"sequence-parallel": keys} if keys else {},
        ),
        folder,
    )  # fmt: skip


def test_one_worker_without_shared_sequences(ptrain_material: Material, tmp_path: Path) -> None:
    """Tiles and offloading need no other workers."""
    specs = {name: prepared(ptrain_material, tmp_path / name, **keys) for name, keys in {"plain": {}, **CASES}.items()}
    run_workers(list(specs.values()), 1)
    said = (specs["plain"].parent / "worker.log").read_text()
    assert said.count("MLPs are computed") == said.count("MLPs are computed 7 tokens at a time") == 1
    plain = records(specs["plain"])
    assert len(plain) > 3
    for name in CASES:
        for one, other in zip(records(specs[name]), plain, strict=True):
            names = [key for key in other if "loss" in key or key in ("grad_norm", "tokens")]
            assert names and [one[key] for key in names] == pytest.approx([other[key] for key in names], rel=1e-5), name


def records(spec: Path) -> list[dict[str, Any]]:
    """The metrics of steps and evaluations."""
    return [json.loads(line) for line in (spec.parent / "metrics.jsonl").read_text().splitlines()]
