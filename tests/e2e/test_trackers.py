"""TensorBoard and Weights & Biases (offline) record what the JSON lines do."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import run, run_workers

NAMES = ("loss", "lr", "grad_norm", "tokens")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: blocks of 32 KiB, as LevelDB writes its log, with a protobuf message in each."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_weights_and_biases_offline(recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = recipe_file(train_iters=4, eval_interval=2, data={"train_eval_split": [0.8, 0.2]}, wandb={"enable": True})
    code, _, err = run("run", recipe)
    assert code == 0, err
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    history: dict[tuple[int, str], Any] = {}
    config: dict[str, Any] = {}
    for record in wandb_records(file):
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            history |= {(items["step"], name): value for name, value in items.items()}
        if record.HasField("run"):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    expected = {(line["step"], name): value for line in lines(tmp_path / "run") for name, value in line.items()}
    assert {(4, "loss"), (2, "eval/loss"), (4, "eval/loss")} <= set(expected)
    assert {place: history[place] for place in expected} == pytest.approx(expected)
    assert config["type"] == "sft" and config["train_iters"] == 4


def test_tensorboard_also_after_a_resume(recipe_file: Any, tmp_path: Path) -> None:
    """Each step stands there once, with the values of the JSON lines."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_file(train_iters=6, trackers=["tensorboard"])
    code, _, err = run("run", recipe, "-o", "exit_iteration_this_run=4")
    assert code == 0, err
    code, _, err = run("run", recipe, "--resume")
    assert code == 0, err
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in NAMES:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], line[name]) for line in lines(tmp_path / "run")]
        assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_every_third_evaluation_is_recorded(recipes: Any, prepared: Any) -> None:
    """The one at the start, those due, and the last one: once, though it is made again where the run is resumed."""
    twice = ["loss", {"type": "loss", "name": "again"}]
    changes = {"train_iters": 6, "eval_at_start": True, "eval_interval": 1, "eval_log_iter_interval": 3}
    kept = [{"type": "deepspeed", "save_end_of_training": True}]
    recipe = recipes(data={"train_eval_split": [0.8, 0.2]}, evaluation=twice, checkpoint=kept, **changes)
    for resume in (False, True):
        spec = prepared(recipe, "run", resume=resume)
        run_workers([spec], 1)
        found = [line for line in lines(spec.parent) if "eval/loss" in line]
        assert [line["step"] for line in found] == [0, 3, 6]
        assert all(line["eval/again/loss"] == line["eval/loss"] for line in found)
