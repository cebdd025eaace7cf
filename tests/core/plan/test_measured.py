"""What a plan says of memory is what workers hold: small models are trained with DeepSpeed, and measured part by part."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("plan_worker.py")
MODEL: dict[str, Any] = {
    "config": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2},
    "attn_implementation": "sdpa",
}  # fmt: skip
ZERO = {"reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 20_000}
"""In proportion to the model. With the defaults all of it would be one bucket, and nothing would be sharded."""
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def case(
    dtype: str,
    stage: int,
    *,
    model: Any = None,
    zero: Any = None,
    followed: bool = False,
    tile: int = 2**28,
    **keys: Any,
) -> dict[str, Any]:
    """A case of `plan_worker.py`."""
    recipe = {
        "type": "tiny", "data": {"sources": [{"type": "jsonl", "path": "unused.jsonl"}]}, "micro_batch_size": 4,
        "model": {**MODEL, "dtype": dtype, **(model or {})},
        "deepspeed": {"zero_optimization": {"stage": stage, **ZERO, **(zero or {})}}, **keys,
    }  # fmt: skip
    return {"recipe": recipe, "followed": followed, "tile": tile}


ALONE = {
    "fp32, ZeRO 0": case("fp32", 0, followed=True),
    "bf16, ZeRO 0": case("bf16", 0),
    "bf16, ZeRO 1, tiles of 40 labels": case("bf16", 1, followed=True, tile=4 * 1000 * 40),
    "bf16, ZeRO 2, a frozen layer": case("bf16", 2, followed=True, freeze="layers.0"),
    "fp32, ZeRO 0, activations computed again": case(
        "fp32", 0, followed=True, model={"disable_activation_checkpoint": False}
    ),
    "fp32, ZeRO 0, eager": case("fp32", 0, followed=True, model={"attn_implementation": "eager"}),
    "bf16, ZeRO 2, offloaded": case("bf16", 2, zero=OFFLOADED),
}
TWO = {
    "fp32, ZeRO 2": case("fp32", 2),
    "bf16, ZeRO 1": case("bf16", 1),
    "bf16, ZeRO 2, two micro-batches": case("bf16", 2, gradient_accumulation_steps=2),
    "fp32, ZeRO 3": case("fp32", 3),
    "bf16, ZeRO 3, a frozen layer": case("bf16", 3, freeze="layers.0"),
    "bf16, ZeRO 3, offloaded": case("bf16", 3, zero=OFFLOADED),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was planned and what was measured, by case; both groups of workers run at the same time."""
    groups = [(ALONE, 1), (TWO, 2)]
    folders = [tmp_path_factory.mktemp(f"workers-{count}") for _, count in groups]
    started = [start(cases, count, folder) for (cases, count), folder in zip(groups, folders, strict=True)]
    codes = [process.wait(500) for processes in started for process in processes]
    logs = "\n".join(log.read_text()[-3000:] for folder in folders for log in folder.glob("*.log"))
    assert not any(codes), logs
    return {name: one for folder in folders for name, one in json.loads((folder / "found.json").read_text()).items()}


def start(cases: dict[str, Any], workers: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """The workers, each with its log in the folder."""
    listed, processes = folder / "cases.json", []
    listed.write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ, "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DISABLE": "1",
    }  # fmt: skip
    for rank in range(workers):
        with (folder / f"{rank}.log").open("w") as out:
            command = [sys.executable, str(WORKER), str(listed), str(folder / "found.json")]
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own, stdout=out, stderr=subprocess.STDOUT))
    return processes


@pytest.mark.parametrize("name", [*ALONE, *TWO])
def test_what_is_kept_is_as_planned(found: dict[str, Any], name: str) -> None:
    """Weights, gradients and optimizer state to within a hundredth, and all that Python can reach together."""
    planned, measured = found[name]["planned"], found[name]["measured"]
    parts = ["weights"] if "offloaded" in name else ["weights", "gradients", "optimizer"]
    for part in parts:
        assert planned[part] == pytest.approx(measured[part], rel=0.01), part
    everything = sum(planned[part] for part in ("weights", "gradients", "optimizer", "host"))
    assert everything == pytest.approx(measured["everything"], rel=0.08)


@pytest.mark.parametrize("name", [name for name, one in ALONE.items() if one["followed"]])
def test_what_passes_take_is_as_planned(found: dict[str, Any], name: str) -> None:
    """What the allocator has given out at the most, for the body of the model and for the log-probabilities."""
    planned, measured = found[name]["planned"], found[name]["measured"]
    assert planned["activations"] == pytest.approx(measured["activations"], rel=0.05)
    assert planned["logits"] == pytest.approx(measured["logits"], rel=0.15)


@pytest.mark.parametrize("name", [*ALONE, *TWO])
def test_no_step_takes_more_than_planned(found: dict[str, Any], name: str) -> None:
    """The most that the allocator has out at a time in a whole step, all that was there before included."""
    planned, measured = found[name]["planned"], found[name]["measured"]
    assert measured["peak"] <= 1.01 * (planned["peak"] + planned["host"]) <= 1.35 * measured["peak"]
    if "offloaded" not in name:
        assert measured["update"] <= 1.01 * planned["update"] + 1000


def test_what_is_trained(found: dict[str, Any]) -> None:
    """What a plugin freezes has neither gradient nor state."""
    frozen, whole = (found[name]["planned"] for name in ("bf16, ZeRO 2, a frozen layer", "bf16, ZeRO 0"))
    assert frozen["total"] == whole["total"] == whole["trained"]
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384 + 2 * 128
    assert frozen["trained"] == frozen["total"] - layer
    assert whole["resumable"] == pytest.approx(12 * whole["trained"], rel=0.001)
