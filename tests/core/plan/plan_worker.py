"""One of several workers that train small models, and measure what a plan says of them.

    python plan_worker.py CASES.json FOUND.json

Many cases go through one process, because starting one costs seconds. A case is `{"recipe", "followed", "tile"}`, by
name. Rank 0 writes, for each, what the plan says and what was measured, in bytes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ptrain import Config, Trainer, hookimpl
from ptrain import engine as engines
from ptrain.catalog import Catalog, Offer
from ptrain.model import logprobs, nll
from ptrain.model.head import output_head
from ptrain.plan.devices import Device
from ptrain.plan.memory import Memories
from ptrain.plan.model import UnknownTokenizer, make_config, make_model, make_optimizer, parameters
from ptrain.plan.rows import Batch
from ptrain.recipe.load import load_recipe
from ptrain.run import Run
from ptrain.setup import create_model

VOCABULARY, LENGTH = 1000, 96
LABELS = 120


class Tiny(Trainer):
    """A trainer that may freeze a part of the model, as plugins do."""

    class Config(Config):
        """Keys of `tiny`."""

        freeze: str = ""
        """Parameters with this in their name are not trained."""

    parts = {"source": "jsonl"}

    @hookimpl(wrapper=True)
    def create_model(self, run: Run) -> Any:
        """The model with a part of it frozen, and buffers of its own."""
        model = yield
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not self.config.freeze or self.config.freeze not in name)
        return model


def new_run(recipe: dict[str, Any], rank: int, world: int) -> Run:
    """A run without anything in it."""
    catalog = Catalog.installed().with_classes({Offer("trainer", "tiny", "ptrain-tests", "0", "tests"): Tiny})
    run = Run(
        load_recipe(recipe, catalog=catalog), Path("nowhere"), rank=rank, world=world, local_rank=rank, data_rank=rank,
        data_world=world,
    )  # fmt: skip
    run.tokenizer = UnknownTokenizer(VOCABULARY)  # type: ignore[assignment]
    return run


def planned(recipe: dict[str, Any], world: int) -> dict[str, Any]:
    """What a plan says of the recipe."""
    run, unknown = new_run(recipe, 0, world), []
    run.device = torch.device("meta")
    assert make_config(run, unknown)
    run.model = make_model(run, unknown)
    sizes = parameters(run.model, make_optimizer(run, run.model, unknown))
    samples = run.recipe.micro_batch_size
    memories = Memories(run, Device("cpu", "cpu", 2**34), sizes, unknown)
    memory = memories.of(Batch(samples, LENGTH, LABELS))
    assert unknown == []
    return {
        "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
        "activations": memory.activations, "logits": memory.logits, "update": memory.update, "host": memory.host,
        "peak": memory.peak,
        "trained": sizes.trainable, "total": sizes.total, "resumable": memories.resumable_bytes(),
    }  # fmt: skip


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of each storage that some tensors have."""
    there = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return {storage._cdata: storage.nbytes() for storage in there}


def alive() -> list[torch.Tensor]:
    """Every tensor that was made since the case began and that Python can reach."""
    gc.collect()
    return [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not one.is_meta]


def measured(recipe: dict[str, Any], rank: int, world: int, followed: bool) -> dict[str, Any]:
    """What a worker really holds; where the passes through the model are `followed`, what they allocate too."""
    gc.freeze()  # what is there already is neither looked at nor collected any more
    run = new_run(recipe, rank, world)
    run.device = torch.device("cpu")
    create_model(run)
    found = passes(run) if followed else {}
    run.optimizer = run.call("create_optimizer", model=run.model)
    run.engine = run.call("create_engine", model=run.model, optimizer=run.optimizer, scheduler=None)
    run.engine.train(True)
    batch = new_batch(run)
    for _ in range(2):
        all_passes(run, batch)
        gradients, after_backward = gradients_of(run), storages(alive())
        updated = peak(run.engine.update)
    counted = storages(batch.values())
    base = sum(size for key, size in storages(alive()).items() if key not in counted)
    whole = peak(lambda: (all_passes(run, batch), run.engine.update()))
    weights = storages(t for p in run.model.parameters() for t in (p.data, getattr(p, "ds_tensor", None)))
    weights.update(storages(run.model.buffers()))
    optimizer = {key: size for key, size in storages(optimizer_tensors(run)).items() if key not in weights}
    everything = {key: size for key, size in {**after_backward, **gradients}.items() if key not in counted}
    return {
        **found, "weights": sum(weights.values()), "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()), "everything": sum(everything.values()),
        "update": updated, "peak": base + whole,
    }  # fmt: skip


def all_passes(run: Run, batch: dict[str, Any]) -> None:
    """Forward and backward of the micro-batches of a step in the engine."""
    for _ in range(run.accumulation):
        run.engine.backward(-run.engine(lambda: log_probabilities(run, batch)).sum())


def new_batch(run: Run) -> dict[str, Any]:
    """A micro-batch of one document a row, with `LABELS` labels."""
    shape = (run.recipe.micro_batch_size, LENGTH)
    labels = torch.full((shape[0] * LENGTH,), -100)
    labels[:LABELS] = torch.arange(LABELS)
    return {
        "input_ids": torch.arange(shape[0] * LENGTH).view(shape) % VOCABULARY, "shift_labels": labels.view(shape),
        "position_ids": torch.arange(LENGTH).expand(shape), "document_lengths": [[LENGTH]] * shape[0],
    }  # fmt: skip


def log_probabilities(run: Run, batch: dict[str, Any]) -> torch.Tensor:
    """As trainers compute them."""
    hidden = run.call("forward", model=run.model, batch=batch)
    return run.call("token_logprobs", hidden=hidden, labels=batch["shift_labels"])


def gradients_of(run: Run) -> dict[int, int]:
    """Storages of gradients, wherever DeepSpeed keeps them between a backward pass and the step."""
    wrapper: Any = run.engine.deepspeed.optimizer
    kept: list[Any] = [p.grad for p in run.model.parameters()]
    for name in ("all_grad_tensors", "averaged_gradients"):
        for tensors in dict(getattr(wrapper, name, None) or {}).values():
            kept += tensors or []
    kept.append(getattr(wrapper, "grad_partitions_flat_buffer", None))
    found = storages(kept)
    # Under ZeRO a gradient may be a view of something that lives longer than it.
    return {key: size for key, size in found.items() if size}


def optimizer_tensors(run: Run) -> list[Any]:
    """The fp32 weights of the optimizer and its state."""
    optimizer: Any = run.engine.deepspeed.basic_optimizer
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    masters += getattr(run.engine.deepspeed.optimizer, "fp32_partitioned_groups_flat", [])
    return [*masters, *(value for state in optimizer.state.values() for value in state.values())]


def passes(run: Run) -> dict[str, int]:
    """What a forward and a backward pass keep and allocate, without an engine round the model."""
    run.model.train()
    batch = new_batch(run)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
    states = run.call("forward", model=run.model, batch=batch).detach().requires_grad_()

    def body() -> None:
        hidden = run.call("forward", model=run.model, batch=batch)
        hidden.backward(torch.ones_like(hidden))

    def head(stage: str) -> None:
        run.call(stage, hidden=states, labels=batch["shift_labels"], head=output_head(run.model)).sum().backward()

    logits = max(peak(lambda stage=stage: head(stage)) for stage in ("token_logprobs", "token_nll"))
    found = {"activations": peak(body), "logits": logits}
    for hook in hooks:
        hook.remove()
    return found


def peak(work: Any) -> int:
    """The most bytes that PyTorch's allocator has out at a time while `work` is done, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def main(cases: str, found: str) -> int:
    """Measure every case."""
    engines.start("cpu", int(os.environ["LOCAL_RANK"]))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(1)
    nll.PART_BYTES = 2**14  # in proportion to the models
    results = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        logprobs.TILE_BYTES = case.get("tile", logprobs.TILE_BYTES)
        real = measured(case["recipe"], rank, world, case.get("followed", False))
        results[name] = {"planned": planned(case["recipe"], world), "measured": real}
    if rank == 0:
        Path(found).write_text(json.dumps(results, indent=1))
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
