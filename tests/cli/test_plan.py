"""`ptrain plan`: what a run will need, held against the run itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ptrain = Callable[..., tuple[int, str, str]]
MORE = """\
data.train_eval_split=[0.9, 0.1]
data.pack_samples=true
train_iters=0
epochs=2
micro_batch_size=2
gradient_accumulation_steps=2
scheduler.name=cosine
checkpoint=[{type: deepspeed, save_every_n_steps: 5, keep_last: 2}, {type: huggingface, save_end_of_training: true}]
output_dir=out
""".splitlines()
OVERRIDES = [word for line in MORE for word in ("-o", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, recipe_text: str) -> Path:
    """A folder with a recipe."""
    made = tmp_path_factory.mktemp("plan")
    (made / "tiny.yaml").write_text(recipe_text)
    return made


@pytest.fixture(scope="module")
def planned(folder: Path, ptrain_in: Callable[[Path], Ptrain]) -> dict[str, Any]:
    """The plan of a recipe, as JSON; then it is run."""
    code, out, err = ptrain_in(folder)("plan", "tiny.yaml", *OVERRIDES, "--json")
    assert code == 0 and "warning:" not in err, err
    # Nothing but the cache of prepared data is written.
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "tiny.yaml"]
    prepared = sorted(path.name for path in (folder / "cache").iterdir())
    code, printed, err = ptrain_in(folder)("run", "tiny.yaml", *OVERRIDES)
    assert code == 0, err
    assert sorted(path.name for path in (folder / "cache").iterdir()) == prepared, "the run prepared its data anew"
    return {**json.loads(out), "printed": printed}


def size(path: Path) -> int:
    """Bytes of the tensors in a checkpoint."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_steps_and_rates_are_those_of_the_run(planned: dict[str, Any], folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    recorded = {line["step"]: line["lr"] for line in lines if "lr" in line}
    steps = planned["steps"]
    assert steps["total"] == steps["last"] == max(recorded) and steps["per_epoch"] * 2 == steps["total"]
    rates = {one["step"]: one["rate"] for one in steps["rates"]}
    assert [one["share"] for one in steps["rates"]] == [0, 0.25, 0.5, 0.75, 1] and len(rates) == 5
    assert rates == pytest.approx({step: recorded[step] for step in rates})


def test_data_is_that_of_the_run(planned: dict[str, Any]) -> None:
    printed = " ".join(planned["printed"].split())
    for split in ("train", "eval"):
        rows = planned["rows"][split]
        assert f"{split}: {rows['rows']:,} rows, {rows['samples']:,} samples, {rows['tokens']:,} tokens" in printed
    assert planned["rows"]["train"]["fullness"] > 0.8 and 0 <= planned["padding"] < 0.2
    assert f"{planned['parameters']['total'] / 1e6:.1f}M parameters" in printed


def test_checkpoints_are_those_of_the_run(planned: dict[str, Any], folder: Path) -> None:
    """Their steps, how many are kept, and their size but for what stands at the beginning of a file."""
    resumable, export = planned["saved"]
    for entry, where in ((resumable, "checkpoints"), (export, "model")):
        there = sorted(path for path in (folder / "out" / where).glob("step-*"))
        assert [int(path.name[5:]) for path in there] == entry["steps"][-entry["kept"] :]
        for path in there:
            assert entry["bytes"] == pytest.approx(size(path), rel=0.05)
    assert resumable["kept"] == 2 and resumable["most"] == 3 * resumable["bytes"]


def test_for_people(folder: Path, planned: dict[str, Any], ptrain_in: Callable[[Path], Ptrain]) -> None:
    """It fits 80 columns, says the most wanted first, and holds the numbers of the JSON."""
    arguments = ["plan", "tiny.yaml", *OVERRIDES, "--workers", "2", "--device", "a100-40gb"]
    code, out, err = ptrain_in(folder)(*arguments, env={"COLUMNS": "80", "FORCE_COLOR": "1"})
    assert code == 0 and "warning:" not in err, err
    lines = out.splitlines()
    assert re.match(
        r"sft on 2 workers: \d+ optimizer steps; each needs [\d.]+ GiB of 37\.3 GiB \(a100-40gb\): fits", out
    )
    assert max(map(len, lines[1:])) <= 80 and "\x1b" not in out
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles[1:] == [
        "steps", "data", "memory of each worker", "with another choice", "checkpoints", "not known"
    ]  # fmt: skip
    assert (
        f"{planned['parameters']['total']:,} parameters, all trained; fp32, ZeRO 2, activations computed again" in out
    )
    rows = [line.split()[:2] for line in lines if line.startswith("  ZeRO ")]
    assert [stage for _, stage in rows[:3]] == ["0", "1", "3"]


def test_a_step_at_several_shares_is_told_once(ptrain: Ptrain, recipe: Path) -> None:
    code, out, err = ptrain("plan", recipe, "-o", "train_iters=2")
    assert code == 0, err
    told = " ".join(out.split())
    assert told.count("at step 1") == told.count("at step 2") == 1


def test_what_is_not_here_is_not_known(ptrain: Ptrain, recipe: Path) -> None:
    """Nobody is asked for a model and a tokenizer that are elsewhere, though that is not forbidden; the rest is said."""
    remote = ["-o", "model={name_or_path: nobody/nothing}", "-o", "tokenizer={type: huggingface}"]
    code, out, err = ptrain("plan", recipe, *remote, "-o", "train_iters=0", env={"HF_HUB_OFFLINE": "0"})
    assert code == 0 and "warning:" not in err, err
    said = " ".join(out.split())
    assert "optimizer steps not known; memory not known" in said
    missing = "`nobody/nothing` can't be loaded: it is not in the cache of the hub, and the hub is not asked"
    assert f"the tokenizer of the model {missing}" in said and f"memory: the model {missing}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "optimizer.lrr=1"], "`lrr`"),
        (["--device", "h100"], "write `h100-80gb` or `h100-94gb`"),
        (["--device", "a100-80bg"], "write `a100-80gb`"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_what_is_wrong_is_said(ptrain: Ptrain, recipe: Path, arguments: list[str], said: str) -> None:
    code, out, err = ptrain("plan", recipe, *arguments)
    assert (code, out) == (2, "") and said in err
