"""One of several workers that make real runs without data, train them, and save, restore and export them.

    python tiny_runs.py CASES.json

Many cases go through one process, because starting one costs seconds. A case is `{"do", "dir", "recipe", ...}`; what
`do` returns is written by rank 0 as `<dir>/result.json`, and an error that users would see as `{"error": its text}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ptrain import Trainer, hookimpl, saving
from ptrain import engine as engines
from ptrain import weights as keeping
from ptrain.catalog import Catalog, Offer
from ptrain.checkpoint import huggingface
from ptrain.errors import PtrainError
from ptrain.recipe.load import load_recipe
from ptrain.run import Run
from ptrain.setup import create_model

ROWS, STEPS = 4, 3


class Tiny(Trainer):
    """A trainer with a state of its own: JSON and a tensor."""

    parts = {"source": "jsonl"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.state: dict[str, Any] = {"notes": [], "sum": torch.zeros(2)}

    @hookimpl
    def save_state(self, run: Run) -> Mapping[str, Any]:
        """Everything."""
        return self.state

    @hookimpl
    def load_state(self, run: Run, state: Mapping[str, Any]) -> None:
        """Everything."""
        self.state = dict(state)


def state(run: Run) -> dict[str, Any]:
    """The state of the trainer of a run."""
    return next(layer.plugin for layer in run.stack.layers if isinstance(layer.plugin, Tiny)).state


def build(case: Mapping[str, Any], rank: int, world: int) -> Run:
    """A run with everything that saving and training need."""
    catalog = Catalog.installed().with_classes({Offer("trainer", "tiny", "ptrain-tests", "0", "tests"): Tiny})
    run = Run(load_recipe(case["recipe"], catalog=catalog), Path(case["dir"]), rank=rank, world=world)
    run.data_rank, run.data_world = rank, world
    run.device = torch.device("cpu")
    run.tokenizer = run.call("create_tokenizer")
    run.train_data = range(case.get("rows", 7))
    run.total_steps = 2 * STEPS
    create_model(run)
    run.optimizer = run.call("create_optimizer", model=run.model)
    run.scheduler = run.call("create_scheduler", optimizer=run.optimizer, total_steps=run.total_steps)
    run.engine = run.call("create_engine", model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    run.engine.train(True)
    return run


def train(run: Run, steps: int = STEPS) -> list[float]:
    """The global loss of each step; a step has `ROWS` rows, dealt out to the workers."""
    losses = []
    for _ in range(steps):
        drawn = torch.Generator().manual_seed(run.progress.step)
        rows = torch.randint(0, run.hf_config.vocab_size, (ROWS, 9), generator=drawn)
        total = torch.zeros(())
        for row in rows[run.data_rank :: run.data_world]:
            loss = run.engine(lambda ids=row[None]: loss_of(run, ids)) / ROWS
            run.engine.backward(loss)
            total += loss.detach()
        losses.append(engines.sum_over_workers([float(total)], run.device)[0])
        run.engine.update()
        run.scheduler.step()
        run.progress.step += 1
        state(run)["notes"].append(run.progress.step)
        state(run)["sum"] += 1
    return losses


def loss_of(run: Run, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss of a row."""
    logits = run.model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])


def go_on(case: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Train to the end; save in the middle, or begin in the middle, with what was saved there."""
    part = saving.resumable(run)
    if "load" in case:
        part.load(run, Path(case["load"]))
        probe = huggingface.probe_logits(run)
    else:
        train(run, case.get("before", STEPS))
        probe = huggingface.probe_logits(run)
        folder = Path(case["dir"]) / "state"
        folder.mkdir(exist_ok=True)
        torch.distributed.barrier()
        part.save(run, folder)
    losses = train(run)
    weights(run, case)
    rest = {"step": run.progress.step, "lr": run.scheduler.get_last_lr(), "notes": state(run)["notes"]}
    return {"losses": losses, "probe": float(probe.double().sum()), "sum": state(run)["sum"].tolist(), **rest}


def weights(run: Run, case: Mapping[str, Any]) -> None:
    """Write the whole weights."""
    from safetensors.torch import save_file

    found = huggingface.gathered(run)
    if run.rank == 0:
        save_file(found, Path(case["dir"]) / "weights.safetensors")


def refuse(case: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Load what must be refused."""
    saving.resumable(run).load(run, Path(case["load"]))
    return {"loaded": True}


def export(case: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Train a little and export as a run does; also the logits that the export must have."""
    from safetensors.torch import save_file

    train(run, 2)
    part = run.parts.checkpoints[0]
    logits = huggingface.probe_logits(run)
    with damage(case.get("damage"), run, part):
        path = saving.save(run, part) if case.get("whole", True) else _save_alone(run, part, Path(case["dir"]))
    if run.rank == 0:
        save_file({"logits": logits}, Path(case["dir"]) / "logits.safetensors")
    return {"path": str(path), "ids": huggingface.probe_ids(run)}


def _save_alone(run: Run, part: Any, folder: Path) -> Path:
    """Without the store, whose barrier a worker would wait at for one that failed."""
    run.engine.train(False)
    part.save(run, folder)
    return folder


@contextlib.contextmanager
def damage(kind: str | None, run: Run, part: Any) -> Iterator[None]:
    """Make something go wrong that has gone wrong elsewhere."""
    if kind == "not gathered":
        whole, keeping.whole = keeping.whole, lambda parameter: parameter.detach()
        yield
        keeping.whole = whole
        return
    if kind == "not finite":
        run.model.get_input_embeddings().weight.data[3, 3] = float("nan")
    if kind in ("altered", "missing", "template"):
        part.save = _then(part.save, lambda path: _change_file(path, kind))
    yield


def _then(save: Any, change: Any) -> Any:
    def both(run: Run, path: Path) -> None:
        save(run, path)
        change(path)

    return both


def _change_file(folder: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    if kind == "template":
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text() + "{{- ' And now?' -}}")
        return
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    if kind == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})


def main(listed: str) -> int:
    """Run every case."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    engines.start("cpu", rank)
    torch.set_num_threads(1)
    for case in json.loads(Path(listed).read_text()):
        Path(case["dir"]).mkdir(exist_ok=True)
        run = build(case, rank, world)
        try:
            result = {"do": case["do"], **{"go_on": go_on, "refuse": refuse, "export": export}[case["do"]](case, run)}
        except PtrainError as error:
            result = {"error": str(error)}
        if rank == 0:
            (Path(case["dir"]) / "result.json").write_text(json.dumps(result))
        torch.distributed.barrier()
    return 0


if __name__ == "__main__":
    try:
        code = main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Tearing the interpreter down after DeepSpeed takes a second.
    os._exit(code)
