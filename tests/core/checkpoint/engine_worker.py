"""One of several workers that train tiny models, save their state, and go on from saved states.

    python engine_worker.py FOLDER CASES.json

Many cases go through one process, because starting one costs seconds. A case is `{"name", "stage", "dtype",
"save": folder or null, "load": folder or null, ...}`. Rank 0 writes `FOLDER/<name>.safetensors`: the losses and the
final weights by name.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ptrain import engine as engines
from ptrain import engine_state

STEPS, SAVED_AT, ROWS = 6, 3, 4
VOCABULARY, HIDDEN = 37, 15
"""Odd on purpose: no number of workers divides every parameter."""


class Tiny(torch.nn.Module):
    """A language model with tied embeddings, a bias, a norm, a frozen layer, dropout and a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.inner = torch.nn.Linear(HIDDEN, 2 * HIDDEN + 1)
        self.frozen = torch.nn.Linear(2 * HIDDEN + 1, HIDDEN).requires_grad_(False)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(VOCABULARY))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [b, s, v]."""
        hidden = self.embed(ids)
        inner = torch.nn.functional.dropout(torch.relu(self.inner(hidden)), 0.1, self.training)
        return self.head(self.norm(hidden + self.frozen(inner)) * self.scale)


def made(case: Mapping[str, Any], seed: int) -> tuple[Tiny, engines.Engine, Any]:
    """A model with weights from `seed` (the frozen layer is always the same), its engine and its schedule."""
    torch.manual_seed(0)
    frozen = Tiny().frozen
    torch.manual_seed(seed)
    model = Tiny()
    model.frozen.load_state_dict(frozen.state_dict())
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case["dtype"], torch.float32)
    model.to(dtype)
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    kind = getattr(torch.optim, case.get("optimizer", "AdamW"))
    optimizer = kind(groups, lr=1e-2, **case.get("options", {}))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (2 * STEPS))
    return model, engines.Engine(model, optimizer, configuration(case), clip=1.0), schedule


def configuration(case: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration of a case."""
    zero = {"stage": case["stage"], "stage3_param_persistence_threshold": 20, **case.get("zero", {})}
    block: dict[str, Any] = {
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "managed_gradient_accumulation": False, "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1, "steps_per_print": None,
    }  # fmt: skip
    if case["dtype"] in ("bf16", "fp16"):
        block[case["dtype"]] = {"enabled": True, **case.get("precision", {})}
    if case["dtype"] == "autocast":
        block["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return block


def train(case: Mapping[str, Any], model: Tiny, engine: engines.Engine, schedule: Any, steps: range) -> list[float]:
    """The global loss of each step; a step has `ROWS` rows, dealt out to the workers."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in steps:
        rows = torch.randint(0, VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(step))
        model.seen.add_(torch.bincount(rows.flatten(), minlength=VOCABULARY))
        total = 0.0
        for row in rows[rank::world]:
            torch.manual_seed(1000 * step + int(row[0]))
            loss = engine(lambda ids=row[None]: loss_of(case, model, ids))
            engine.backward(loss / ROWS)
            total += float(loss.detach()) / ROWS
        losses.append(engines.sum_over_workers([total], torch.device("cpu"))[0])
        engine.update()
        schedule.step()
    return losses


def loss_of(case: Mapping[str, Any], model: Tiny, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss of a row, times a case's `spike`, by which a loss scale overflows."""
    logits = model(ids[:, :-1]).float()
    return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])


def save(case: Mapping[str, Any], model: Tiny, engine: engines.Engine, schedule: Any, rank: int) -> None:
    """Write what `gather` gives, and the small state, into the folder of the case."""
    folder = Path(case["save"])
    folder.mkdir(parents=True, exist_ok=True)
    found = {f"{name}/{key}": value for name, key, value in engine_state.gather(engine, model, rank)}
    if rank == 0:
        save_file({name: value for name, value in found.items() if value is not None}, folder / "state.safetensors")
        scale = engine_state.loss_scale(engine)
        (folder / "small.json").write_text(json.dumps([scale, engine_state.frozen_sums(model), schedule.last_epoch]))
    else:
        engine_state.frozen_sums(model)
        assert all(value is None for value in found.values())


def load(case: Mapping[str, Any], model: Tiny, engine: engines.Engine, schedule: Any) -> None:
    """Put a saved state into a fresh engine."""
    folder = Path(case["load"])
    tensors = load_file(folder / "state.safetensors")
    keys: dict[str, set[str]] = {}
    for full in tensors:
        name, _, key = full.rpartition("/")
        keys.setdefault(name, set()).add(key)
    scale, sums, last = json.loads((folder / "small.json").read_text())
    assert engine_state.frozen_sums(model) == sums
    engine_state.restore(engine, model, keys, lambda name, key: tensors[f"{name}/{key}"])
    engine_state.set_loss_scale(engine, scale)
    schedule.last_epoch = last - 1
    schedule.step()


def weights(model: Tiny, engine: engines.Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole weights and buffers by name."""
    import deepspeed

    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.stage == 3):
            yield name, parameter.detach().clone()
    yield "seen", model.seen.clone()


def run(case: Mapping[str, Any], folder: Path) -> None:
    """Train one case and write what came out."""
    rank = torch.distributed.get_rank()
    if case.get("load"):
        model, engine, schedule = made(case, seed=2)
        load(case, model, engine, schedule)
        losses = train(case, model, engine, schedule, range(SAVED_AT, STEPS))
    else:
        model, engine, schedule = made(case, seed=1)
        losses = train(case, model, engine, schedule, range(SAVED_AT))
        if case.get("save"):
            save(case, model, engine, schedule, rank)
        losses = train(case, model, engine, schedule, range(SAVED_AT, STEPS))
    found = dict(weights(model, engine))
    if rank == 0:
        save_file(
            {"losses": torch.tensor(losses, dtype=torch.float64), **found}, folder / f"{case['name']}.safetensors"
        )


def main(folder: str, cases: str) -> int:
    """Run every case."""
    if any(case["dtype"] == "fp16" for case in json.loads(Path(cases).read_text())):
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True  # it is only slow
    engines.start("cpu", int(os.environ["LOCAL_RANK"]))
    for case in json.loads(Path(cases).read_text()):
        try:
            run(case, Path(folder))
        except BaseException:
            print("case", case)
            if not os.environ.get("KEEP_GOING"):
                raise
            traceback.print_exc()
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
