"""How a worker gets from the prepared data to a run that is ready for its first step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain import garbage
from ptrain.checks import check_model
from ptrain.directory import KILL_SWITCH
from ptrain.launch import hang
from ptrain.recipe.env import value_of
from ptrain.run import Run, steps_for
from ptrain.seeds import seed_everything
from ptrain.trackers import Trackers
from ptrain.trackers.console import Console
from ptrain.trackers.jsonl import JsonLines

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ptrain.parts import Tracker
    from ptrain.recipe.load import Loaded


def new_run(loaded: Loaded, directory: Path, spec: Mapping[str, Any], stop: Any) -> Run:
    """The run of this worker, in its process group, on its device, with nothing built yet."""
    import torch

    from ptrain import engine
    from ptrain.launch.environment import Topology

    topology = Topology.from_environment(os.environ)
    run = Run.on(loaded, directory, topology)
    run.stop = stop
    run.command = spec["command"]
    run.recipe_hash = spec["recipe_hash"]
    run.kill_switch = value_of(run.recipe.kill_switch_path, "kill_switch_path") or directory / KILL_SWITCH
    # Longer than until one of them is taken to hang, which tells more.
    wait = hang.limit(run.recipe.hang_timeout, run.world) + 60
    run.device = engine.start("cuda" if torch.cuda.is_available() else "cpu", topology.local_rank, wait)
    if run.device.type == "cuda":
        run.device_memory = torch.cuda.get_device_properties(run.device).total_memory
    run.trackers = Trackers(trackers(run) if run.rank == 0 else [])
    return run


def trackers(run: Run) -> list[Tracker]:
    """The display and the JSON lines, which are always there, and what the recipe adds."""
    chosen: list[Tracker] = [Console(Console.Config()), JsonLines(JsonLines.Config())]
    if run.recipe.wandb.enable:
        from ptrain.trackers.wandb import WandB

        chosen.append(WandB(WandB.Config()))
    return [*chosen, *run.parts.trackers]


def build(run: Run, prepared: Path, resume_from: Path | None) -> None:
    """Fill the run, stage by stage; the last line is the state that it goes on from."""
    from ptrain import saving
    from ptrain.data.cache import open_prepared
    from ptrain.model.apart import check_apart, packed

    saving.adopt_global_batch(run, resume_from)
    data = open_prepared(prepared)
    run.tokenizer = data.tokenizer()
    run.train_data, run.eval_data, run.data_digest = data.train, data.eval, data.digest()
    run.train_loader = run.call("create_dataloader", split="train", dataset=run.train_data)
    run.eval_loader = run.call("create_dataloader", split="eval", dataset=run.eval_data)
    run.total_steps = steps_for(run.recipe, run.steps_per_epoch)
    create_model(run)
    run.optimizer = run.call("create_optimizer", model=run.model)
    run.scheduler = run.call("create_scheduler", optimizer=run.optimizer, total_steps=run.total_steps)
    run.engine = run.call("create_engine", model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    if packed(run.train_data):
        run.engine(lambda: check_apart(run))
    run.engine.train(True)
    if resume_from is not None:
        saving.resume(run, resume_from)
    describe(run)
    run.trackers.start(run)


def create_model(run: Run) -> None:
    """Make configuration and model; weights drawn at random are the same on every worker."""
    seed_everything(run.recipe.seed, "model")
    check_model(run)
    garbage.look_as_usual()
    run.model = run.call("create_model", config=run.hf_config)


def describe(run: Run) -> None:
    """Print what will happen, and what was chosen where the recipe leaves it open."""
    recipe = run.recipe
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in run.model.parameters()]
    whole, trained = sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
    share = "" if trained == whole else f", of which {trained:,} are trained"
    batch = recipe.micro_batch_size * run.accumulation * run.data_world
    run.say(
        f"{recipe.type}: {whole / 1e6:.1f}M parameters{share}, {len(run.train_data):,} training samples, "
        f"{len(run.eval_data):,} for evaluation; {run.total_steps:,} optimizer steps of {batch} samples "
        f"({recipe.micro_batch_size} x {run.accumulation} x {run.readers}), ZeRO {run.engine.stage}, "
        f"{recipe.model.dtype} on {run.device.type}"
    )
    run.say(f"activations are {_activations(run.model)}")


def _activations(model: PreTrainedModel) -> str:
    # The model's own property was renamed; what it asks its modules was not.
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "computed again in the backward pass, which takes less memory and more time"
    return "kept for the backward pass"
