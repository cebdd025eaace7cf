"""Resume where something is another: the number of workers, the model, the batches of an evaluation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import losses, run_workers
from safetensors.torch import load_file

from ptrain.testing.recipes import merged

SAVES = [
    {"type": "deepspeed", "save_every_n_steps": 3},
    {"type": "huggingface", "save_end_of_training": True, "verify": False},
]


def weights(spec: Path) -> dict[str, torch.Tensor]:
    """The exported weights."""
    files = sorted((spec.parent / "model" / "latest").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_close(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Losses and weights agree."""
    torch.testing.assert_close(losses(found), losses(expected), atol=tolerance, rtol=0)
    old = weights(expected)
    for name, value in weights(found).items():
        torch.testing.assert_close(value, old[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_on_another_number_of_workers(before: int, after: int, recipes: Any, prepared: Any) -> None:
    """The global batch is kept by changing the accumulation; losses and weights agree to 1e-5."""
    recipe = recipes(micro_batch_size=1, gradient_accumulation_steps=4 // before, checkpoint=SAVES, epochs=2)
    whole, cut = prepared(recipe, "whole"), prepared(merged(recipe, {"exit_iteration": 5}), "cut")
    run_workers([whole, cut], before)
    run_workers([prepared(recipe, "cut", resume=True)], after)
    assert_close(cut, whole)


def test_a_checkpoint_of_another_model_is_refused(recipes: Any, prepared: Any, tmp_path: Path) -> None:
    """Names and shapes are compared before anything is loaded."""
    from ptrain.errors import PtrainError

    cut = prepared(recipes(checkpoint=SAVES, exit_iteration=3), "cut")
    run_workers([cut], 1)
    changed = recipes(checkpoint=SAVES, model={"hf_config_kwargs": {"intermediate_size": 96}})
    with pytest.raises(PtrainError, match=r"another recipe.*intermediate_size"):
        prepared(changed, "cut", resume=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluation_does_not_depend_on_the_batches(workers: int, recipes: Any, prepared: Any, tmp_path: Path) -> None:
    """13 ragged rows: the same loss to 1e-6 for evaluation batches of 1, 2, 3 and 13, on 1 and 2 workers."""
    from ptrain.testing.rows import conversations, write_rows

    path = write_rows(tmp_path / "eval.jsonl", conversations(13, seed=5))
    specs = []
    for size, packed, stage in itertools.product([1, 2, 3, 13], [False], [0, 3]):
        specs.append(
            prepared(
                recipes(
                    data={"eval_sources": [{"type": "jsonl", "path": str(path)}], "pack_samples": packed},
                    deepspeed={"zero_optimization": {"stage": stage}},
                    evaluation=[{"type": "loss"}],
                    eval_at_start=True,
                    eval_micro_batch_size=size,
                    exit_iteration=1,
                    micro_batch_size=4,
                )
            )
        )
    run_workers(specs, workers)
    found = [json.loads((spec.parent / "metrics.jsonl").read_text().splitlines()[0])["eval/loss"] for spec in specs]
    assert max(found) - min(found) < 1e-6, found
    assert found[0] == pytest.approx(_bare_evaluation(specs[0], recipes()["model"]["name_or_path"]), abs=1e-6)


def _bare_evaluation(spec: Path, model_folder: str) -> float:
    """The token-weighted loss of the evaluation rows, one document at a time."""
    import bare_loop
    from transformers import AutoModelForCausalLM

    from ptrain.data.cache import open_prepared

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in open_prepared(Path(json.loads(spec.read_text())["prepared"])).eval:
            total += bare_loop.loss_sum(model, (row["input_ids"], row["labels"])).item()
            count += sum(label != -100 for label in row["labels"][1:])
    return total / count
