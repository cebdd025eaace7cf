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

from ptrain.errors import CheckpointError
from ptrain.parts import Checkpoint
from ptrain.recipe.sections import CheckpointConfig

if TYPE_CHECKING:
    import torch

    from ptrain.run import Run

FORMAT = 1
SHARD_BYTES = 2 * 10**9
STATE, INDEX, PLUGINS = "state.json", "index.json", "plugins.safetensors"


class DeepSpeedCheckpoint(Checkpoint):
    """Weights in fp32, the optimizer's state, the schedule, progress and plugins' state."""

    resumable = True

    class Config(CheckpointConfig):
        """Keys of `deepspeed`."""

    def save(self, run: Run, path: Path) -> None:
        """Gather parameter by parameter; rank 0 writes, and holds one shard at a time."""
        from ptrain import engine_state

        writer = _Shards(path)
        for name, tensors in engine_state.gather(run.engine, run.model, run.rank):
            if run.rank == 0:
                writer.add(name, tensors)
        states = run.states()
        if run.rank == 0:
            writer.close()
            self._write_state(run, path, states)

    def _write_state(self, run: Run, path: Path, states: Mapping[str, Mapping[str, Any]]) -> None:
        from safetensors.torch import save_file

        from ptrain import engine_state

        plain, tensors = _divided(states)
        if tensors:
            save_file(tensors, path / PLUGINS)
        batch = run.recipe.micro_batch_size * run.accumulation * run.data_world
        state = {
            "format": FORMAT,
            "progress": asdict(run.progress),
            "global_batch": batch,
            "world": run.world,
            "rows": len(run.train_data),
            "scheduler": _json_only(run.scheduler.state_dict()),
            "parameters": engine_state.shapes(run.model),
            "plugins": plain,
        }
        (path / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def load(self, run: Run, path: Path) -> None:
        """Put everything back.

        Raises:
            CheckpointError: it belongs to another model, another amount of data, or another version's format.
        """
        from ptrain import engine_state
        from ptrain.results import Progress

        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        _check(run, path, state)
        reader = _Reader(path)
        engine_state.restore(run.engine, run.model, reader.read, state["progress"]["step"])
        run.progress = Progress(**state["progress"])
        run.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(run.optimizer.param_groups, state["scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        run.restore_states(_joined(state["plugins"], path / PLUGINS))


def _check(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    from ptrain import engine_state

    if state["format"] != FORMAT:
        raise CheckpointError(f"`{path}` has the format {state['format']}", expected=f"format {FORMAT}")
    saved, wanted = state["parameters"], engine_state.shapes(run.model)
    wrong = [
        f"{n}: {saved.get(n)} there, {wanted.get(n)} here" for n in {**saved, **wanted} if saved.get(n) != wanted.get(n)
    ]
    if wrong:
        raise CheckpointError(
            f"`{path}` is a checkpoint of another model: " + "; ".join(wrong[:3]),
            fix="resume with the recipe of that run",
        )
    if state["rows"] != len(run.train_data):
        raise CheckpointError(
            f"`{path}` was made with {state['rows']} training samples, and there are {len(run.train_data)} now",
            fix="resume with the same data, or begin a new run from the exported model",
        )


def _json_only(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler's state is data: functions and the optimizer are made anew from the recipe."""
    found = {}
    for key, value in state.items():
        try:
            found[key] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return found


def _divided(states: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Plugins' states as JSON values and as tensors named `plugin/key`."""
    import torch

    plain: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for plugin, state in states.items():
        plain[plugin] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{plugin}/{key}"] = value.detach().cpu().contiguous().clone()
            else:
                plain[plugin][key] = value
    return plain, tensors


def _joined(plain: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    from safetensors.torch import load_file

    states = {plugin: dict(state) for plugin, state in plain.items()}
    for name, tensor in (load_file(path) if path.exists() else {}).items():
        plugin, _, key = name.partition("/")
        states.setdefault(plugin, {})[key] = tensor
    return states


class _Shards:
    """Writes tensors into safetensors files of bounded size, with an index from parameter to file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._index: dict[str, dict[str, Any]] = {}
        self._number = 0

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add the tensors of one parameter."""
        self._index[name] = {"file": f"state-{self._number:05d}.safetensors", "tensors": list(tensors)}
        for key, tensor in tensors.items():
            self._held[f"{name}/{key}"] = tensor.contiguous().clone()
            self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is held, and the index."""
        self._flush()
        (self._path / INDEX).write_text(json.dumps(self._index, indent=1), encoding="utf-8")

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._held:
            save_file(self._held, self._path / f"state-{self._number:05d}.safetensors")
            self._held, self._bytes, self._number = {}, 0, self._number + 1


class _Reader:
    """Reads the tensors of one parameter at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = json.loads((path / INDEX).read_text(encoding="utf-8"))

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a parameter, on the CPU."""
        from safetensors import safe_open

        entry = self._index[name]
        with safe_open(self._path / entry["file"], framework="pt") as file:
            return {key: file.get_tensor(f"{name}/{key}") for key in entry["tensors"]}
