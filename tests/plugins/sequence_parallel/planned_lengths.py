"""What workers do to measure the passes of long rows, beside what a plan says of them; run in processes of their own."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2] / "core" / "plan"))
import plan_worker as worker  # pyright: ignore[reportMissingImports]

from ptrain import engine
from ptrain.plan.devices import Device
from ptrain.plan.memory import Memories
from ptrain.plan.model import make_config, make_model, make_optimizer, parameters
from ptrain.plan.rows import Batch
from ptrain.setup import create_model
from ptrain_sequence_parallel import exchange
from ptrain_sequence_parallel.groups import Group

VOCABULARY, LABELS = worker.VOCABULARY, worker.LABELS
ROUNDS, PAUSE = 4, 0.005
"""How often it is measured, of which the least counts, and seconds: what others do at the time only adds to it."""


def measure(cases: dict[str, dict[str, Any]], found: Path) -> None:
    """For each case, a recipe and the length of its rows, what is planned and what is measured: `found`, by rank 0."""
    engine.start("cpu", int(os.environ["LOCAL_RANK"]))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(1)
    results = {}
    for name, case in cases.items():
        real = measured(case["recipe"], case["length"], rank, world)
        results[name] = {"planned": planned(case["recipe"], case["length"], world), "measured": real}
    if rank == 0:
        found.write_text(json.dumps(results))


def planned(recipe: dict[str, Any], length: int, world: int) -> dict[str, Any]:
    """What a plan says of one micro-batch."""
    run, unknown = worker.new_run(recipe, 0, world), []
    run.device = torch.device("meta")
    assert make_config(run, unknown)
    run.model = make_model(run, unknown)
    sizes = parameters(run.model, make_optimizer(run, run.model, unknown))
    memories = Memories(run, Device("cpu", "cpu", 2**34), sizes, unknown)
    samples = run.recipe.micro_batch_size
    memory = memories.of(Batch(samples, length, samples * length))
    assert unknown == [], unknown
    return {"passes": memory.activations, "host": memory.host, "columns": memory.columns}


def measured(recipe: dict[str, Any], length: int, rank: int, world: int) -> dict[str, Any]:
    """What the allocator has out at the most in the passes through the body of the model, gradients left out."""
    run = worker.new_run(recipe, rank, world)
    run.device = torch.device("cpu")
    create_model(run)
    run.model.train()
    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    samples = run.recipe.micro_batch_size
    ids = torch.arange(samples * length).view(samples, length) % VOCABULARY
    batch = {
        "input_ids": ids, "shift_labels": ids, "position_ids": torch.arange(length).expand(samples, length).clone(),
        "document_ids": torch.zeros_like(ids), "document_lengths": [[length]] * samples, "rows": samples,
    }  # fmt: skip
    (batch,) = run.stack.wrapped("create_dataloader", [batch], run=run, split="train", dataset=None)

    def passes() -> None:
        hidden = run.call("forward", model=run.model, batch=batch)
        hidden.backward(torch.ones_like(hidden))

    with letting_go():
        passes()  # what is made once, in the first
        least = torch.tensor(min(worker.peak(passes) for _ in range(ROUNDS)))
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return {"passes": int(least), "columns": batch["input_ids"].shape[1]}


@contextmanager
def letting_go() -> Iterator[None]:
    """Within it, workers wait a moment after each message: the thread that sends it lets go of it when it likes."""
    swapped = exchange._swapped

    def then_wait(message: torch.Tensor, group: Group) -> torch.Tensor:
        received = swapped(message, group)
        time.sleep(PAUSE)
        return received

    exchange._swapped = then_wait
    try:
        yield
    finally:
        exchange._swapped = swapped
