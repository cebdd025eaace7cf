"""Whole runs whose sequences are cut up over workers are the runs without: losses, gradients, evaluation, resume."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import metrics, run_workers
from safetensors.torch import load_file
from swiftkv_made import make_teacher

from ptrain.testing.recipes import Material, merged
from ptrain.testing.rows import WORDS, write_rows
from ptrain.testing.runs import prepare

STAGES, SIZES = (0, 1, 2, 3), (1, 2, 4)
Case = tuple[str, int, int]
"""A kind of run, the stage of ZeRO, and how many workers share a sequence."""
CHEAP: list[Case] = [("masked", 3, 2), ("dpo", 2, 2), ("swiftkv", 0, 2)]
TRAINERS = {
    "packed": "sft", "masked": "sft", "causal": "causal", "dpo": "dpo", "cached": "dpo", "adapter": "dpo",
    "swiftkv": "swiftkv",
}  # fmt: skip
"""By kind of run."""


def questions() -> Iterator[dict[str, Any]]:
    """Conversations whose answers are so short that whole parts of a row hold no label."""
    rng = random.Random(5)
    for _ in range(17):
        asked, answered = (" ".join(rng.choices(WORDS, k=k)) for k in (rng.randint(30, 60), rng.randint(1, 2)))
        yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def recipe_of(material: Material, kind: str, **changes: Any) -> dict[str, Any]:
    """Three steps of four rows each, with evaluations."""
    folder = material.folder
    adapter = {"model": {"peft_config": {"r": 4, "target_modules": "all-linear"}}}
    if kind == "masked":
        rows = write_rows(folder / "questions.jsonl", questions())
        # Two rows a micro-batch: in the second step some workers have none.
        own: dict[str, Any] = {"data": {"sources": [{"type": "jsonl", "path": str(rows)}]}, "micro_batch_size": 2}
    elif kind == "swiftkv":
        teacher = folder / "teacher"
        if not teacher.exists():
            make_teacher(material.model, teacher)
        own = {"model": {"name_or_path": str(teacher), "num_key_value_layers": 2, "key_value_group_size": 2}}
    else:
        asked = [{"type": "loss"}, {"type": "exact_match", "count": 2, "max_new_tokens": 2}]
        packed = {"data": {"pack_samples": True, "max_length": 97, "overlength": "drop"}, "evaluation": asked}
        own = {
            "packed": packed, "causal": {}, "dpo": {"reference": "online"}, "cached": {"reference": "cached"},
            "adapter": {"reference": "adapter_off", **adapter},
        }[kind]  # fmt: skip
    base = {
        "data": {"train_eval_split": [0.8, 0.2]}, "micro_batch_size": 1, "train_iters": 3, "eval_at_start": True,
        "checkpoint": [{"type": "deepspeed", "save_end_of_training": True}],
    }  # fmt: skip
    return material.recipe(TRAINERS[kind], **merged(merged(base, own), changes))


def shared(size: int, stage: int = 0, *, saving: bool = False, **more: Any) -> dict[str, Any]:
    """What a recipe has besides, so that workers take as many rows a step as without, and `size` of them share each.

    Args:
        stage: of ZeRO.
        saving: everything else that saves memory is on too, otherwise all of it is off.
    """
    off = {"tiled_mlp": False, "tiled_loss": False, "offload_activations": False}
    others = {"tiled_mlp": 7, "tiled_loss": 5, "offload_activations": True} if saving else off
    return {
        "gradient_accumulation_steps": size, "deepspeed": {"zero_optimization": {"stage": stage}},
        "plugins": {"sequence-parallel": {"size": size, **others}},
        "model": {"disable_activation_checkpoint": not saving}, **more,
    }  # fmt: skip


def state(spec: Path) -> dict[str, torch.Tensor]:
    """Weights and moments at the end: the first moment is a sum of gradients."""
    (folder,) = {path.parent for path in spec.parent.glob("**/step-00000003/*.safetensors")}
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def evaluations(spec: Path) -> list[dict[str, Any]]:
    """Metrics of each evaluation."""
    lines = map(json.loads, (spec.parent / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" not in line]


def compare(found: Path, expected: Path, where: str) -> None:
    """Fail where two runs did not do the same: losses to 1e-5, gradients to 1e-4 of the largest one."""
    names = ("loss", "tokens", "grad_norm", "lr", "epoch")
    for one, other in itertools.zip_longest(metrics(found), metrics(expected)):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5, rel=0), where
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-4), where
    for one, other in itertools.zip_longest(evaluations(found), evaluations(expected)):
        assert one == pytest.approx(other, abs=2e-4, rel=1e-4), where
    theirs = state(expected)
    own = state(found)
    assert own.keys() == theirs.keys() and any("exp_avg" in name for name in own)
    for name, value in own.items():
        scale = theirs[name].float().abs().max().item()
        torch.testing.assert_close(
            value, theirs[name], atol=1e-4 * scale, rtol=0, msg=lambda m, n=name: f"{where}, {n}: {m}"
        )


def check(material: Material, folder: Path, cases: list[Case], workers: int) -> None:
    """Make the runs of `cases`, and for each kind one without the feature, in the same workers; compare them."""
    kinds = list(dict.fromkeys(kind for kind, _, _ in cases))
    plain = {kind: prepare(recipe_of(material, kind), folder / kind, workers=workers) for kind in kinds}
    specs = {}
    for case in cases:
        kind, stage, size = case
        recipe = recipe_of(material, kind, **shared(size, stage, saving=size == workers))
        specs[case] = prepare(recipe, folder / "-".join(map(str, case)), workers=workers)
    run_workers([*plain.values(), *specs.values()], workers)
    for (kind, stage, size), spec in specs.items():
        compare(spec, plain[kind], f"{kind}, ZeRO {stage}, {size} workers share a sequence")


def test_runs_are_those_without(ptrain_material: Material, tmp_path: Path) -> None:
    """Parts without a label, workers without rows, pairs with a second model beside, a student."""
    check(ptrain_material, tmp_path, CHEAP, 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", TRAINERS)
def test_runs_are_those_without_in_every_way(kind: str, ptrain_material: Material, tmp_path: Path) -> None:
    """Every trainer, size and stage of ZeRO, on four workers."""
    check(ptrain_material, tmp_path, list(itertools.product([kind], STAGES, SIZES)), 4)


def test_some_part_holds_no_label(ptrain_material: Material, tmp_path: Path) -> None:
    """What `masked` is there for."""
    from ptrain.data.cache import open_prepared
    from ptrain.data.collate import collate
    from ptrain_sequence_parallel.groups import Group
    from ptrain_sequence_parallel.shards import cut

    spec = prepare(recipe_of(ptrain_material, "masked"), tmp_path / "run")
    row = open_prepared(Path(json.loads(spec.read_text())["prepared"])).train.with_format("numpy")[0]
    for size in (2, 4):
        parts = [cut(collate([row], pad_id=0), Group(size, rank), 0)["shift_labels"] for rank in range(size)]
        assert [bool((part != -100).any()) for part in parts] == [False] * (size - 1) + [True]


def resume(material: Material, folder: Path, begun: dict[str, Any], ways: dict[str, Any], workers: int) -> None:
    """Cut a run off after its first step and go on in each way; compare with the run without the feature."""
    # What stays as it is; it is the global batch that is kept, whatever `gradient_accumulation_steps` says.
    same = {"model": {"disable_activation_checkpoint": False}, "gradient_accumulation_steps": 2}

    def made(name: str, resume: bool, **changes: Any) -> Path:
        recipe = recipe_of(material, "packed", **{**changes, **same})
        return prepare(recipe, folder / name, workers=workers, resume=resume)

    rows = {"gradient_accumulation_steps": 2 // begun["gradient_accumulation_steps"]}
    whole = prepare(recipe_of(material, "packed", **rows), folder / "whole", workers=workers)
    run_workers([whole, *(made(name, False, **begun, exit_iteration=1) for name in ways)], workers)
    going_on = [made(name, True, **way) for name, way in ways.items()]
    run_workers(going_on, workers)
    for name, spec in zip(ways, going_on, strict=True):
        found, expected = metrics(spec), metrics(whole)
        assert [line["step"] for line in found] == [1, 2, 3], name
        assert [line["tokens"] for line in found] == [line["tokens"] for line in expected], name
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-5, rel=0)


def test_resume_without(ptrain_material: Material, tmp_path: Path) -> None:
    """A run that is cut off goes on without the feature as if nothing had been."""
    resume(ptrain_material, tmp_path, shared(2, 2), {"without": {**shared(1, 2), "plugins": {}}}, 2)


@pytest.mark.exhaustive
def test_resume_on_another_size(ptrain_material: Material, tmp_path: Path) -> None:
    """It goes on with more or fewer workers that share a sequence, and with them for the first time."""
    sizes = {f"on {size}": shared(size, 2) for size in SIZES}
    resume(ptrain_material, tmp_path / "2", shared(2, 2), {**sizes, "saving": shared(4, 2, saving=True)}, 4)
    resume(ptrain_material, tmp_path / "1", {**shared(1, 2), "plugins": {}}, {"on 4": shared(4, 2)}, 4)


DRAWS = """
import json, random
import ptrain, torch

@ptrain.hookimpl(wrapper=True)
def loss(run, batch):
    if run.model.training:
        with open(run.dir / f"draws-{run.rank}.jsonl", "a") as file:
            file.write(json.dumps([run.progress.step, torch.rand(1).item(), random.random()]) + "\\n")
    return (yield)
"""


def test_shards_drop_out_other_things(ptrain_material: Material, tmp_path: Path) -> None:
    """Torch draws something else on each worker, whatever it shares; what is decided of rows they share. Resumed, both
    are as they would have been."""
    (tmp_path / "draws.py").write_text(DRAWS)
    recipe = recipe_of(ptrain_material, "packed", **shared(2))

    def draws(name: str, resume: bool = False, **changes: Any) -> list[dict[int, list[float]]]:
        spec = prepare({**recipe, **changes}, tmp_path / name, workers=2, resume=resume, code=tmp_path / "draws.py")
        run_workers([spec], 2)
        lines = [(tmp_path / name / f"draws-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
        return [{step: drawn for step, *drawn in map(json.loads, own)} for own in lines]

    first, second = draws("whole")
    assert sorted(first) == [0, 1, 2]
    for step, (torch_drew, python_drew) in first.items():
        assert second[step][0] != torch_drew and second[step][1] == python_drew
    draws("parts", exit_iteration=1)
    assert draws("parts", resume=True) == [first, second]
