"""What a plan says of rows that workers share is what they hold, and the longest that it names fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from planned_lengths import measure

from ptrain.testing.workers import run_workers

SIZES = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
AGAIN = {"disable_activation_checkpoint": False}


def case(length: int, model: dict[str, Any] | None = None, **feature: Any) -> dict[str, Any]:
    """A recipe, and the length of its rows."""
    recipe = {
        "type": "tiny", "data": {"sources": [{"type": "jsonl", "path": "unused.jsonl"}]}, "micro_batch_size": 2,
        "model": {"config": SIZES, "attn_implementation": "sdpa", "dtype": "fp32", **(model or {})},
        "plugins": {"sequence-parallel": feature},
    }  # fmt: skip
    return {"recipe": recipe, "length": length}


PLAIN = {"tiled_mlp": False, "offload_activations": False}
TWO = {
    "kept": case(1000, size=2, **PLAIN),
    "computed again": case(1000, AGAIN, size=2, **PLAIN),
    "tiled": case(1000, AGAIN, size=2, tiled_mlp=64, offload_activations=False),
    "tiled and offloaded": case(1000, AGAIN, size=2, tiled_mlp=64, offload_activations=True),
    "a length that is padded": case(1001, AGAIN, size=2, tiled_mlp=64, offload_activations=False),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was planned and what was measured, by case."""
    folder = tmp_path_factory.mktemp("lengths")
    run_workers(measure, TWO, folder / "found.json", log=folder / "log", workers=2)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", TWO)
def test_passes_take_what_is_planned(found: dict[str, Any], name: str) -> None:
    """To within 15 %, with what lies in the memory of the machine, which is the same memory here."""
    planned, measured = found[name]["planned"], found[name]["measured"]
    assert planned["columns"] == measured["columns"] == -(-TWO[name]["length"] // 2)
    assert planned["passes"] + planned["host"] == pytest.approx(measured["passes"], rel=0.15)
