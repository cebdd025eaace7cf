"""Resume, bit for bit: every moment to stop at, over accumulation, loader and training workers, packing, with dropout.

The suite runs cases in which each pair of values meets; `nox -s tests_full` runs all of them.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import differences, left, run_workers

from ptrain.testing.rows import conversations, write_rows

MOMENTS = ("mid-epoch", "end of an epoch", "killed a step after a save", "inside an evaluation")
SAVE_EVERY, EVALUATE_EVERY, EPOCHS = 3, 2, 3


@dataclass(frozen=True)
class Case:
    """One way to train, and where it is interrupted."""

    moment: str
    accumulation: int
    loader_workers: int
    workers: int
    packed: bool

    @property
    def stage(self) -> int:
        """ZeRO stages take turns."""
        return {(1, False): 0, (4, False): 2, (1, True): 3, (4, True): 1}[self.accumulation, self.packed]

    @property
    def same(self) -> tuple[Any, ...]:
        """Cases with the same uninterrupted run."""
        return self.accumulation, self.workers, self.packed

    @property
    def name(self) -> str:
        """Of the run directory."""
        loaders = f"{self.loader_workers}-loader-workers"
        return f"{self.moment}-{self.accumulation}-{loaders}-{self.packed}".replace(" ", "-")

    def cuts(self, steps_per_epoch: int) -> list[dict[str, Any]]:
        """When it is interrupted, the first and the second time."""
        epoch = steps_per_epoch
        if self.moment == "mid-epoch":
            return [{"step": epoch // 2}, {"step": epoch + (epoch + 1) // 2}]
        if self.moment == "end of an epoch":
            return [{"step": epoch}, {"step": 2 * epoch}]
        if self.moment == "inside an evaluation":
            # The second one is the last of all, after the last step.
            return [{"step": step, "evaluating": True} for step in (2 * EVALUATE_EVERY, EPOCHS * epoch)]
        return [{"step": times * SAVE_EVERY + 1, "kill": True} for times in (1, 2)]


ALL = [Case(*values) for values in itertools.product(MOMENTS, (1, 4), (0, 2), (1, 2), (False, True))]


def pairwise(cases: list[Case]) -> list[Case]:
    """Some of them, chosen greedily, in which each pair of values meets as in all of them."""

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations(vars(case).items(), 2))

    chosen: list[Case] = []
    missing = set().union(*map(pairs, cases))
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


@pytest.fixture
def recipe_of(recipes: Any, tmp_path: Path) -> Any:
    """The recipe of a case."""
    rows = {
        False: write_rows(tmp_path / "rows.jsonl", conversations(33)),
        True: write_rows(tmp_path / "short.jsonl", conversations(110, seed=1, longest=10)),
    }
    held_out = write_rows(tmp_path / "eval.jsonl", conversations(13, seed=5))

    def make(case: Case) -> Any:
        packing = {"pack_samples": True, "max_length": 128, "overlength": "drop"} if case.packed else {}
        return recipes(
            data={
                "sources": [{"type": "jsonl", "path": str(rows[case.packed])}],
                "eval_sources": [{"type": "jsonl", "path": str(held_out)}],
                "dl_num_workers": case.loader_workers,
                **packing,
            },
            model={"hf_config_kwargs": {"attention_dropout": 0.1}},
            micro_batch_size=1 if case.accumulation > 1 else 4 // case.workers,
            gradient_accumulation_steps=case.accumulation,
            deepspeed={"zero_optimization": {"stage": case.stage}},
            checkpoint=[
                {"type": "deepspeed", "save_every_n_steps": SAVE_EVERY},
                {"type": "huggingface", "save_end_of_training": True, "verify": False},
            ],
            evaluation=[{"type": "loss"}],
            eval_interval=EVALUATE_EVERY,
            eval_micro_batch_size=2,
            epochs=EPOCHS,
        )

    return make


def steps_per_epoch(spec: Path) -> int:
    """Of a whole run."""
    last = json.loads((spec.parent / "outcome.json").read_text())["step"]
    assert last % EPOCHS == 0 and last // EPOCHS >= 3, f"{last} steps leave no room to interrupt them"
    return last // EPOCHS


def made(spec: Path) -> dict[str, Any]:
    """All that a run has left: metrics without times, the ids of every step on every worker, the weights."""
    ids: dict[str, str] = {}
    for file in sorted(spec.parent.glob("ids-*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            key = f"{file.stem} step {line['step']}"
            assert ids.setdefault(key, line["ids"]) == line["ids"], f"{key} was given other rows when it was repeated"
    return {**left(spec), "ids": ids}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "cases", [pairwise(ALL), pytest.param(ALL, marks=pytest.mark.exhaustive)], ids=["pairs", "all"]
)
def test_resume_twice_equals_the_uninterrupted_run(
    workers: int, cases: list[Case], recipe_of: Any, prepared: Any
) -> None:
    """Token ids, metrics (each step and each evaluation once) and final weights."""
    # ZeRO-3 comes last, as it changes torch for the whole process.
    own = sorted((case for case in cases if case.workers == workers), key=lambda case: case.stage)
    whole = {case.same: case for case in own}
    expected = {same: prepared(recipe_of(case), f"whole-{'-'.join(map(str, same))}") for same, case in whole.items()}
    run_workers(list(expected.values()), workers)
    for time in range(3):
        specs = []
        for case in own:
            spec = prepared(recipe_of(case), case.name, resume=time > 0)
            cuts = [*case.cuts(steps_per_epoch(expected[case.same])), {"step": -1}]
            (spec.parent / "cut.json").write_text(json.dumps(cuts[time]))
            specs.append(spec)
        run_workers(specs, workers, timeout=1800)
        for case, spec in zip(own, specs, strict=True):
            check_cut(case, spec, time, steps_per_epoch(expected[case.same]))
    wrong = {
        case: found
        for case, spec in zip(own, specs, strict=True)
        if (found := differences(made(spec), made(expected[case.same])))
    }
    assert not wrong


def check_cut(case: Case, spec: Path, time: int, epoch: int) -> None:
    """The run was interrupted when it was to be."""
    outcome = json.loads((spec.parent / "outcome.json").read_text())
    if time == 2:
        assert (outcome["outcome"], outcome["step"]) == ("done", EPOCHS * epoch)
        return
    cut = case.cuts(epoch)[time]
    assert (outcome["outcome"], outcome["step"]) == ("killed" if "kill" in cut else "stopped", cut["step"]), case


def test_the_pairs_are_few_and_complete() -> None:
    """Each two values of two properties meet in a case of the subset."""
    few = pairwise(ALL)
    for one, other in itertools.combinations(vars(ALL[0]), 2):
        wanted = {(vars(case)[one], vars(case)[other]) for case in ALL}
        assert {(vars(case)[one], vars(case)[other]) for case in few} == wanted
    assert len(ALL) == 64 and len(few) <= 12
