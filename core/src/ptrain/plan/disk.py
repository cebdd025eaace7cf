"""What is saved when, and how much of the disk it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptrain.parts import Checkpoint
    from ptrain.plan.memory import Memories
    from ptrain.plan.schedule import Steps
    from ptrain.recipe.sections import CheckpointConfig
    from ptrain.run import Run


@dataclass(frozen=True)
class Saved:
    """One entry of `checkpoint`.

    Attributes:
        type: of its part.
        folder: where it goes.
        when: in words.
        steps: after which it is saved; None where they are not known.
        kept: how many are there in the end.
        bytes: of one; None where that is not known.
        most: bytes at the worst moment: a new one is written before an old one is deleted.
        free: bytes of the disk.
    """

    type: str
    folder: str
    when: str
    steps: list[int] | None
    kept: int | None
    bytes: int | None
    most: int | None
    free: int


def saved(run: Run, steps: Steps | None, memories: Memories | None) -> list[Saved]:
    """What every enabled entry will write.

    Args:
        memories: knows the sizes; None where the model is not known.
    """
    from ptrain import saving
    from ptrain.directory import free_bytes

    found = []
    for part in saving.active(run):
        config, folder = part.config, saving.folder(run, part)
        at = _steps(config, part.resumable, steps) if steps is not None else None
        size, kept, most = _size(part, memories), None, None
        if at is not None:
            kept = min(len(at), config.keep_last or len(at))
            most = size * min(len(at), kept + 1) if size is not None else None
        free = free_bytes(Path(folder).absolute())
        found.append(Saved(config.type, str(folder), when(config), at, kept, size, most, free))
    return found


def _size(part: Checkpoint, memories: Memories | None) -> int | None:
    from ptrain.checkpoint.huggingface import HuggingFaceCheckpoint
    from ptrain.checkpoint.resumable import DeepSpeedCheckpoint

    if memories is not None and isinstance(part, DeepSpeedCheckpoint):
        return memories.resumable_bytes()
    if memories is not None and isinstance(part, HuggingFaceCheckpoint):
        return memories.export_bytes()
    return None


def _steps(config: CheckpointConfig, resumable: bool, steps: Steps) -> list[int] | None:
    from ptrain.saving import is_due

    if config.save_every_n_epochs and steps.per_epoch is None:
        return None
    at = [step for step in range(1, steps.last + 1) if is_due(config, step, steps.per_epoch or 1)]
    ends = config.save_end_of_training if steps.last == steps.total else resumable
    return [*at, steps.last] if ends and steps.last not in at else at


def when(config: CheckpointConfig) -> str:
    """When an entry is saved, in words."""
    every = [
        f"every {count} {unit}s" if count > 1 else f"every {unit}"
        for count, unit in ((config.save_every_n_steps, "step"), (config.save_every_n_epochs, "epoch"))
        if count
    ]
    end = ["at the end"] if config.save_end_of_training else []
    return " and ".join([*every, *end]) or "when the run is stopped"
