"""`Run`: what one run knows. Its attributes fill as stages finish; its manager holds only what the recipe chose."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ptrain import hooks, stages
from ptrain.errors import PluginError, Problem, RecipeError
from ptrain.launch.hang import beat
from ptrain.layer import Layer
from ptrain.local import CALLER
from ptrain.parts import Part
from ptrain.recipe.env import resolve, resolve_known
from ptrain.results import Progress, StopRequested
from ptrain.stack import Stack
from ptrain.trackers import Trackers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ptrain.engine import Engine
    from ptrain.launch.environment import Topology
    from ptrain.model.head import Head
    from ptrain.recipe.load import Loaded
    from ptrain.recipe.sections import Recipe

log = logging.getLogger("ptrain")

FILLED_BY = {
    "tokenizer": "create_tokenizer",
    "raw_rows": "load",
    "train_data": "prepare",
    "eval_data": "prepare",
    "train_loader": "create_dataloader",
    "eval_loader": "create_dataloader",
    "hf_config": "create_config",
    "model": "create_model",
    "optimizer": "create_optimizer",
    "scheduler": "create_scheduler",
    "engine": "create_engine",
    "device": "create_model",
    "total_steps": "create_dataloader",
}
"""Which stage fills which attribute of a run."""


class Derived(dict[str, tuple[Any, str]]):
    """Values that plugins set in `configure`, by dotted key: `(value, because)`."""


@dataclass
class Run:
    """One run of one recipe: what every hook gets as its first argument.

    Attributes:
        recipe: the typed, frozen recipe.
        dir: the run directory.
        rank, world, local_rank: of this worker among all.
        trains: whether `world` is the number of workers that train, or will; a recipe is also looked at without them.
        data_rank, data_world: of this worker among those that read different rows; a plugin that has several workers
            share the same rows sets them in `configure`.
        progress: optimizer steps, epochs, samples and tokens so far.
        stop: has a flag `requested`, set by a signal.
        command: what the user typed; empty in Python.
        recipe_hash: of the keys that change results, and of the user's code.
        data_digest: of the prepared training rows.
        head: maps hidden states to logits; checked against the model when it is first needed.
        device_memory: bytes of the GPU that this worker computes on, or that a plan is made for; None on CPU.
        loss_tile: tokens whose logits are there at a time; None: as many as take a quarter of a GiB.
        kill_switch: the run saves and stops when this file appears.
        accumulation: micro-batches of this worker in one optimizer step.
    """

    loaded: Loaded
    dir: Path
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    trains: bool = False
    data_rank: int = 0
    data_world: int = 1
    progress: Progress = field(default_factory=Progress)
    stop: Any = None
    command: Sequence[str] = ()
    recipe_hash: str = ""
    data_digest: str = ""
    head: Head | None = None
    device_memory: int | None = None
    loss_tile: int | None = None
    kill_switch: Path = Path("stop")
    trackers: Trackers = field(default_factory=lambda: Trackers(()))

    recipe: Recipe = field(init=False)
    accumulation: int = field(init=False)
    stack: Stack = field(init=False)

    tokenizer: PreTrainedTokenizerBase = field(init=False)
    hf_config: PretrainedConfig = field(init=False)
    model: PreTrainedModel = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    scheduler: torch.optim.lr_scheduler.LRScheduler = field(init=False)
    engine: Engine = field(init=False)
    device: torch.device = field(init=False)
    total_steps: int = field(init=False)
    raw_rows: Any = field(init=False)
    train_data: Any = field(init=False)
    eval_data: Any = field(init=False)
    train_loader: Any = field(init=False)
    eval_loader: Any = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = self.loaded.recipe
        self.stack = Stack(layers_of(self.loaded))
        for cls, offer in self.loaded.origins.items():
            if issubclass(cls, Part):
                self.stack.note_part(cls, offer.name, f"{offer.distribution} {offer.version}")
        self._derived = Derived()
        self._configure()
        self.accumulation = self.recipe.gradient_accumulation_steps

    @functools.cached_property
    def parts(self) -> SimpleNamespace:
        """The parts that the recipe chose: `model`, `tokenizer`, `optimizer`, `scheduler` and the lists `sources`,
        `eval_sources`, `checkpoints`, `evaluators`, `trackers`.

        They are made when they are first needed, which is when references to the environment are resolved.
        """
        return make_parts(self.loaded, self.recipe)

    @classmethod
    def on(cls, loaded: Loaded, directory: Path, topology: Topology) -> Run:
        """The run of this worker."""
        return cls(
            loaded, directory, rank=topology.rank, world=topology.world, local_rank=topology.local_rank, trains=True,
            data_rank=topology.rank, data_world=topology.world,
        )  # fmt: skip

    @property
    def shards(self) -> int:
        """How many workers share the same rows, each with a part of every sequence."""
        return self.world // self.data_world

    @property
    def zero(self) -> Mapping[str, Any]:
        """DeepSpeed's block `zero_optimization`, with the stage."""
        from ptrain.engine import deepspeed_config

        return deepspeed_config(self.recipe, self.world)["zero_optimization"]

    @property
    def shard(self) -> int:
        """The number of this worker among those that share its rows."""
        return self.rank % self.shards

    @property
    def readers(self) -> str:
        """Who reads rows of their own, in words: "4 workers", or "2 groups of 2 workers"."""
        if self.shards == 1:
            return f"{self.data_world} workers"
        return f"{self.data_world} group{'s' * (self.data_world > 1)} of {self.shards} workers"

    @property
    def config(self) -> Any:
        """The trainer's own top-level keys."""
        return resolve_known(self.recipe.trainer)

    def __getattr__(self, name: str) -> Any:
        if name in FILLED_BY:
            raise AttributeError(f"run.{name} is not there yet: the stage `{FILLED_BY[name]}` sets it")
        raise AttributeError(f"a run has no attribute `{name}`")

    def call(self, stage: str, **arguments: Any) -> Any:
        """The result of a stage; see `ptrain.hooks`."""
        self.beat(f"`{stage}`")
        return self.stack.call(stage, run=self, **arguments)

    def beat(self, doing: str) -> None:
        """Say that this worker is getting on: it begins `doing`.

        For what takes longer than the recipe's `hang_timeout` without a stage, a batch or a pass through the model.
        """
        beat(doing, self.progress.step)

    def derive(self, key: str, value: Any, *, because: str) -> None:
        """Set the value of a recipe key that was not given (in `configure` alone).

        Raises:
            RecipeError: the recipe or another plugin says something else.
        """
        known = self._derived.get(key)
        given = _given(self.recipe, key)
        if known is not None and known[0] != value:
            raise RecipeError(f"`{key}` must be {value!r} because {because}, and {known[0]!r} because {known[1]}")
        if given is not None and given != value:
            raise RecipeError(
                f"`{key}` is {given!r}, but must be {value!r} because {because}",
                where=self.loaded.positions.get(tuple(key.split("."))),
                fix=f"leave `{key}` out",
            )
        self._derived[key] = (value, because)

    @property
    def derived(self) -> Mapping[str, tuple[Any, str]]:
        """Values that plugins set in `configure`, by dotted key: `(value, because)`."""
        return self._derived

    def _configure(self) -> None:
        problems: list[Problem] = []
        for found in self.stack.call("configure", run=self) or []:
            problems += found
        if problems:
            raise RecipeError.of(problems)
        for key, (value, _) in self._derived.items():
            self.recipe = _with(self.recipe, key.split("."), value)

    def layer_versions(self) -> list[str]:
        """`name origin` of every layer: what prepared data depends on besides the recipe."""
        return [f"{layer.name} {layer.origin}" for layer in self.stack.layers]

    def states(self) -> dict[str, Mapping[str, Any]]:
        """What the layers want to find again after a resume, by layer."""
        return {name: state for name, state in self.stack.collect("save_state", run=self) if state}

    def restore_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Give each layer its state back."""
        for name, state in states.items():
            self.stack.tell("load_state", name, run=self, state=state)

    def warn(self, message: str) -> None:
        """Tell the user, once a run, on rank 0."""
        if self.rank == 0:
            log.warning(message)

    def say(self, message: str, *, whole: bool = False) -> None:
        """Print a line for the user, on rank 0.

        Args:
            whole: it holds what is copied, so that no line is broken on a narrow terminal but by the terminal.
        """
        if self.rank == 0:
            from ptrain.trackers.console import say

            say(message, whole=whole)

    def stop_if_asked(self) -> None:
        """Stop where a signal or the kill switch asks some worker to; every worker must ask equally often.

        Raises:
            StopRequested: which the loop catches, to save and to end the run.
        """
        from ptrain.engine import any_worker

        asked = self.stop is not None and self.stop.requested
        if any_worker(asked or self.kill_switch.exists(), self.device):
            raise StopRequested

    def agree(self, flag: bool) -> bool:
        """What rank 0 says, on every worker; every worker must ask."""
        from ptrain import engine

        return engine.any_worker(flag and self.rank == 0, self.device)

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Within it, the model computes what it would without its adapter (`model.peft_config`).

        Raises:
            ModelError: it has none.
        """
        from ptrain.model.adapters import switched_off

        with switched_off(self.model):
            yield

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows."""
        return self.train_loader.steps_per_epoch

    def weights(self, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight and buffer of the model by name, whole even where ZeRO shards it; for checkpoint parts.

        In their own dtype, on the device; tied weights once. Every worker must go through all of them, since each is
        gathered from all; copy what you keep.

        Args:
            trained_only: leave out the parameters that are not trained.
        """
        from ptrain import engine_state
        from ptrain.weights import whole

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or not trained_only:
                self.beat(f"the weight `{name}`")
                yield name, whole(parameter)
        yield from engine_state.buffers(self.model)

    def backward(self, loss: Any, counts: Mapping[str, Any]) -> None:
        """Backpropagate one micro-batch: weight x sum / global count, summed over the terms of `loss`.

        This is the one division of a step. `counts` comes from `ptrain.stages.global_counts`.

        Raises:
            PluginError: a term of the loss is absent from the counts.
        """
        stages.backward(self, loss, counts)


def layers_of(loaded: Loaded) -> list[Layer]:
    """The stack of a recipe, bottom-up: core, trainer, features, user code."""
    core = Layer(stages, "core", f"ptrain-core {importlib.metadata.version('ptrain-core')}")
    trainer = loaded.trainer(resolve_known(loaded.recipe.trainer))
    layers = [core, _layer(loaded, trainer, loaded.recipe.type)]
    for name, feature in loaded.features.items():
        layers.append(_layer(loaded, feature(resolve_known(loaded.recipe.plugins[name])), name))
    if loaded.user_code is not None:
        module, path = loaded.user_code.module, loaded.user_code.path
        callbacks = [(event, f) for f in vars(module).values() for event in getattr(f, hooks.CALLBACK, ())]
        layers.append(Layer(module, "user code", str(path or CALLER), callbacks, user=True))
    return layers


def _layer(loaded: Loaded, plugin: Any, name: str) -> Layer:
    offer = loaded.origins.get(type(plugin))
    origin = f"{offer.distribution} {offer.version}" if offer is not None else "user code"
    return Layer(plugin, name, origin, tuple(plugin.callbacks))


def make_parts(loaded: Loaded, recipe: Recipe) -> SimpleNamespace:
    """An instance of each part that the recipe chose, with its environment references resolved."""

    def many(classes: Sequence[Any], configs: Sequence[Any]) -> list[Any]:
        return [cls(resolve(config)) for cls, config in zip(classes, configs, strict=True)]

    return SimpleNamespace(
        model=loaded.model(resolve(recipe.model)),
        tokenizer=loaded.tokenizer(resolve(recipe.tokenizer)),
        optimizer=loaded.optimizer(resolve(recipe.optimizer)),
        scheduler=loaded.scheduler(resolve(recipe.scheduler)),
        sources=many(loaded.sources, recipe.data.sources),
        eval_sources=many(loaded.eval_sources, recipe.data.eval_sources),
        checkpoints=many(loaded.checkpoint, recipe.checkpoint),
        evaluators=many(loaded.evaluation, recipe.evaluation),
        trackers=many(loaded.trackers, recipe.trackers),
    )


def _given(recipe: Any, key: str) -> Any:
    """The value that the recipe itself gives to a dotted key, or None."""
    node = recipe
    for name in key.split("."):
        if name not in getattr(node, "model_fields_set", ()):
            return None
        node = getattr(node, name)
    return node


def _with(node: Any, path: Sequence[str], value: Any) -> Any:
    if path[0] not in type(node).model_fields:
        raise PluginError(f"a plugin derives `{'.'.join(path)}`, which is no key of {type(node).__name__}")
    new = value if len(path) == 1 else _with(getattr(node, path[0]), path[1:], value)
    return node.model_copy(update={path[0]: new})


def steps_for(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: `train_iters`, or `epochs` rounded up."""
    by_epochs = math.ceil(recipe.epochs * steps_per_epoch - 1e-9)
    return recipe.train_iters or max(by_epochs, recipe.min_iterations)
