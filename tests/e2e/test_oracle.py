"""Training against the bare loop: losses and final weights, however the batch is cut."""

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

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
STAGES = [0, 2, 3]


def token_rows(spec: Path, split: str = "train") -> list[list[bare_loop.Document]]:
    """The prepared rows of a split as documents."""
    from ptrain.data.cache import open_prepared

    rows = []
    for row in getattr(open_prepared(Path(json.loads(spec.read_text())["prepared"])), split):
        ends = list(itertools.accumulate(row["document_lengths"]))
        spans = zip([0, *ends], ends, strict=False)
        rows.append([(row["input_ids"][a:b], row["labels"][a:b]) for a, b in spans])
    return rows


def exported(spec: Path) -> dict[str, torch.Tensor]:
    """The weights that the run exported."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(spec.parent / "model" / "latest", dtype=torch.float32).state_dict()


def case(recipes: Callable[..., Any], kind: str, packed: bool, stage: int, micro: int, accumulation: int) -> Any:
    """The recipe of one cut."""
    return recipes(
        kind,
        data={"pack_samples": True, "max_length": 96, "overlength": "drop"} if packed else {},
        deepspeed={"zero_optimization": {"stage": stage}},
        epochs=4 if packed else 2,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        checkpoint=[{"type": "huggingface", "save_end_of_training": True, "verify": False}],
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("kind", "packed"), [("sft", False), ("sft", True), ("causal", False)])
def test_equals_the_bare_loop(
    kind: str, packed: bool, workers: int, recipes: Any, prepared: Any, tiny_model: Path
) -> None:
    """Losses and weights agree to 1e-5 for every cut of the batch, every ZeRO stage, on 1 and 2 workers."""
    from transformers import AutoModelForCausalLM

    cuts = list(itertools.product(STAGES, CUTS))
    specs = [prepared(case(recipes, kind, packed, stage, *cut)) for stage, cut in cuts]
    run_workers(specs, workers)
    rows = token_rows(specs[0])
    steps = len(losses(specs[0]))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = bare_loop.train(model, rows, batch=8 * workers, steps=steps, lr=1e-3, seed=42)
    assert steps == (4 if packed else 2) * -(-len(rows) // (8 * workers)) and steps >= 4
    weights = model.state_dict()
    for (stage, cut), spec in zip(cuts, specs, strict=True):
        where = f"{kind} packed={packed} workers={workers} ZeRO {stage} {cut[0]}x{cut[1]}"
        torch.testing.assert_close(losses(spec), expected, atol=1e-5, rtol=0, msg=lambda m, w=where: f"{w}: {m}")
        found = exported(spec)
        for name, value in weights.items():
            difference = (found[name] - value).abs().max().item()
            assert difference <= 1e-5, f"{where}: {name} differs by {difference}"


def test_learning_rate_reaches_its_end_at_the_last_step(recipes: Any, prepared: Any) -> None:
    """Warm-up peaks exactly at its last step and the rate is 0 after the last one, whatever the accumulation."""
    specs = [prepared(recipes(micro_batch_size=8 // n, gradient_accumulation_steps=n, epochs=5)) for n in (1, 4)]
    run_workers(specs, 1)
    for spec in specs:
        rates = [record["lr"] for record in metrics(spec)]
        assert len(rates) == 20 and rates[0] == 0.0
        assert rates[2] == pytest.approx(1e-3) and max(rates) == rates[2]
        assert json.loads((spec.parent / "outcome.json").read_text())["lr"] == [0.0, 0.0]
        assert rates[-1] > 0
