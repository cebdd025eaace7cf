"""`deepspeed`: the checkpoint that training is resumed from: safetensors and JSON, by parameter name.

It holds no pickle and nothing that belongs to a worker, so it loads on any number of workers and ZeRO stage.
Random generators need no saving: core seeds them anew at each step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.checkpoint import store
from ptrain.errors import CheckpointError, PluginError
from ptrain.parts import Checkpoint
from ptrain.recipe.sections import CheckpointConfig

if TYPE_CHECKING:
    import torch

    from ptrain.run import Run

FORMAT = 2
SHARD_BYTES = 2 * 10**9
STATE, INDEX, PLUGINS = "state.json", "index.json", "plugins.safetensors"


class DeepSpeedCheckpoint(Checkpoint):
    """Weights in fp32, the optimizer's state, the schedule, progress and plugins' state."""

    resumable = True
    folder = "checkpoints"

    class Config(CheckpointConfig):
        """Keys of `deepspeed`."""

    def save(self, run: Run, path: Path) -> None:
        """Gather parameter by parameter; rank 0 writes, and holds one file's worth at a time.

        Raises:
            CheckpointError: the optimizer keeps a state that can't be told apart by parameter.
            PluginError: a plugin's state is neither JSON nor tensors.
        """
        from ptrain import engine_state

        writer = Shards(path)
        for name, key, tensor in engine_state.gather(run.engine, run.model, run.rank):
            if tensor is not None:
                writer.add(name, key, tensor)
        frozen = engine_state.frozen_sums(run.model)
        states = run.states()
        if run.rank == 0:
            writer.close()
            self._write_state(run, path, states, frozen)

    def _write_state(
        self, run: Run, path: Path, states: Mapping[str, Mapping[str, Any]], frozen: Mapping[str, int]
    ) -> None:
        from safetensors.torch import save_file

        from ptrain import engine_state

        plain, tensors = divided(states)
        if tensors:
            store.fault(f"write {PLUGINS}")
            save_file(tensors, path / PLUGINS)
        batch = run.recipe.micro_batch_size * run.accumulation * run.data_world
        state = {
            "format": FORMAT,
            "recipe_hash": run.recipe_hash,
            "data": run.data_digest,
            "progress": asdict(run.progress),
            "global_batch": batch,
            "world": run.world,
            "rows": len(run.train_data),
            "scheduler": schedule_state(run.scheduler.state_dict()),
            "loss_scale": engine_state.loss_scale(run.engine),
            "parameters": engine_state.shapes(run.model),
            "frozen": dict(frozen),
            "plugins": plain,
        }
        store.fault(f"write {STATE}")
        (path / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def load(self, run: Run, path: Path) -> None:
        """Put everything back.

        Raises:
            CheckpointError: it is damaged, or belongs to another model, optimizer, amount of data or format.
        """
        from ptrain import engine_state
        from ptrain.results import Progress

        state = saved_state(path)
        _check(run, path, state)
        reader = Reader(path)
        states = joined(state["plugins"], path / PLUGINS)
        engine_state.restore(run.engine, run.model, reader.keys(), reader.read)
        engine_state.set_loss_scale(run.engine, state["loss_scale"])
        run.progress = Progress(**state["progress"])
        run.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        run.restore_states(states)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{path}` can't be read: {error}", fix="resume from an earlier checkpoint") from error


def saved_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of the run that made it.

    Raises:
        CheckpointError: it can't be read, or is of another format.
    """
    state = _json(path / STATE)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"`{path}` has the format {state.get('format')}", expected=f"format {FORMAT}")
    return state


def _check(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    check_model(run, path, state)
    if state["rows"] != len(run.train_data):
        raise CheckpointError(
            f"`{path}` was made with {state['rows']} training samples, and there are {len(run.train_data)} now",
            fix="resume with the same data, or begin a new run from the exported model",
        )


def check_model(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError where `run.model` is not the one that `path` was made with; every worker must ask."""
    from ptrain import engine_state

    refuse_other_model(path, state["parameters"], engine_state.shapes(run.model))
    sums = engine_state.frozen_sums(run.model)
    if sums != state["frozen"]:
        name = next(name for name in {**sums, **state["frozen"]} if sums.get(name) != state["frozen"].get(name))
        raise CheckpointError(
            f"the frozen weight `{name}` is not the one that `{path}` was made with",
            fix="resume with the model of that run (`model.revision` pins one on the hub)",
        )


def refuse_other_model(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the shapes of the parameters, by name, are not those in the checkpoint `path`."""
    wrong = [
        f"`{name}` is {saved.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
        for name in {**saved, **wanted}
        if saved.get(name) != wanted.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"`{path}` is a checkpoint of another model: " + "; ".join(wrong[:3]) + more,
            fix="resume with the model of that run: the folder or the revision that `model` names has changed",
        )


def schedule_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a schedule's state is data: functions and the like are made anew from the recipe."""
    found = {}
    for key, value in state.items():
        value = value.item() if hasattr(value, "item") else value
        try:
            # What JSON would change (numbers as keys, say) is a setting, and as such made anew too.
            if json.loads(json.dumps(value)) == value:
                found[key] = value
        except (TypeError, ValueError):
            continue
    return found


def divided(states: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Plugins' states as JSON values, and as tensors named `plugin/key`.

    Raises:
        PluginError: a value is neither a tensor nor JSON.
    """
    import torch

    plain: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for plugin, state in states.items():
        plain[plugin] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{plugin}/{key}"] = value.detach().cpu().contiguous().clone()
            else:
                _check_plain(value, f"`{key}` of the state that `{plugin}` saves")
                plain[plugin][key] = value
    return plain, tensors


def _check_plain(value: Any, where: str) -> None:
    """Raise PluginError where JSON would not give `value` back."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, inner in value.items():
            _check_plain(inner, f"`{key}` in {where}")
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, where)
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise PluginError(
            f"{where} is a {type(value).__name__}",
            expected="a tensor, or text, numbers, booleans, None, lists and dicts with text as keys",
        )


def joined(plain: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    """What `divided` took apart; `path` is the file of the tensors, which may be absent.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    states = {plugin: dict(state) for plugin, state in plain.items()}
    try:
        tensors = load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"`{path}` can't be read: {error}", fix="resume from an earlier checkpoint") from error
    for name, tensor in tensors.items():
        plugin, _, key = name.partition("/")
        states[plugin][key] = tensor
    return states


class Shards:
    """Writes tensors into safetensors files of bounded size, with an index by parameter.

    Args:
        path: the folder.
        limit: bytes of a file; only a tensor that is larger by itself makes a larger one.
    """

    def __init__(self, path: Path, limit: int = SHARD_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._index: dict[str, dict[str, str]] = {}
        self._number = 0

    def add(self, name: str, key: str, tensor: torch.Tensor) -> None:
        """Add one tensor of a parameter, which is the writer's from then on."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > self._limit:
            self._flush()
        self._index.setdefault(name, {})[key] = self._file
        self._held[f"{name}/{key}"] = tensor.contiguous()
        self._bytes += size

    def close(self) -> None:
        """Write what is held, and the index."""
        self._flush()
        store.fault(f"write {INDEX}")
        (self._path / INDEX).write_text(json.dumps(self._index, indent=1), encoding="utf-8")

    @property
    def _file(self) -> str:
        return f"state-{self._number:05d}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._held:
            store.fault(f"write {self._file}")
            save_file(self._held, self._path / self._file)
            self._held, self._bytes, self._number = {}, 0, self._number + 1


class Reader:
    """Reads one tensor at a time from what `Shards` wrote."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = _json(path / INDEX)

    def keys(self) -> dict[str, set[str]]:
        """The keys by name."""
        return {name: set(files) for name, files in self._index.items()}

    def read(self, name: str, key: str) -> torch.Tensor:
        """The tensor, on the CPU.

        Raises:
            CheckpointError: it is not there, or its file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path / self._index[name][key], framework="pt") as tensors:
                return tensors.get_tensor(f"{name}/{key}")
        except (KeyError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"`{self._path}` does not hold `{key}` of `{name}` as its index says: {error}",
                fix="resume from an earlier checkpoint",
            ) from error
