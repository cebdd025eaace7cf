"""Recipes one after the other: each is run, and then mined from, in processes that may be stopped at any time."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ptrain
from ptrain_embed.vectors import read_note, write_note

if TYPE_CHECKING:
    from ptrain import Run

PROGRAM = "ptrain_cli"
"""What `ptrain` is, as a module to run."""
CHANGED = "changed"
"""The state of a recipe that has changed since, or of one after it: it is run anew."""


@dataclass(frozen=True)
class Stage:
    """A recipe of a pipeline.

    Attributes:
        recipe: its file.
        overrides: `key=value`.
        workers: of its run.
    """

    recipe: Path
    overrides: Sequence[str]
    workers: int | None

    def open(self) -> Run:
        """The recipe, checked."""
        return ptrain.open_recipe(self.recipe, self.overrides)

    def command(self, reached: str) -> list[str]:
        """What runs it, from where it has got to."""
        words = [sys.executable, "-m", PROGRAM, "run", str(self.recipe)]
        words += [word for one in self.overrides for word in ("-o", one)]
        words += ["--workers", str(self.workers)] if self.workers else []
        return words + {"begun": ["--resume"], CHANGED: ["--restart"]}.get(reached, [])

    def digest(self) -> str:
        """Changes with what the recipe says."""
        said = "\0".join([self.recipe.read_text(encoding="utf-8"), *self.overrides])
        return hashlib.blake2b(said.encode(), digest_size=12).hexdigest()


def run_stages(stages: Sequence[Stage], say: Callable[[str], None], mine: Callable[[Run], int]) -> int:
    """Do what is not done yet of each stage; return the exit code of the first that fails, or 0.

    What is done is noted in the folder `runs`; a recipe that has changed is run anew, and so are those after it.

    Args:
        mine: mines as a recipe says; its exit code.

    Raises:
        PtrainError: a recipe is wrong; nothing was run.
    """
    for stage in stages:
        stage.open()
    note = Note(Path("runs") / f"pipeline-{'-'.join(stage.recipe.stem for stage in stages)}.json")
    before = ""
    for stage in stages:
        before = hashlib.blake2b(f"{before} {stage.digest()}".encode(), digest_size=12).hexdigest()
        code = _complete(stage, before, note, say, mine)
        if code:
            say(f"{stage.recipe}: exit code {code}; the same command goes on from here")
            return code
    return 0


class Note:
    """How far each recipe of a pipeline has got: `begun`, `trained` or `done`."""

    def __init__(self, path: Path) -> None:
        self._path, self._state = path, read_note(path)

    def reached(self, name: str, digest: str) -> str:
        """How far this recipe has got; empty where it was never begun, `CHANGED` where it was another one."""
        known = self._state.get(name)
        if known is None:
            return ""
        return known["reached"] if known["digest"] == digest else CHANGED

    def reach(self, name: str, digest: str, state: str) -> None:
        """Write down how far it has got."""
        self._state[name] = {"digest": digest, "reached": state}
        self._path.parent.mkdir(exist_ok=True)
        write_note(self._path, self._state)


def _complete(stage: Stage, digest: str, note: Note, say: Callable[[str], None], mine: Callable[[Run], int]) -> int:
    """Do what is left of a stage; its exit code."""
    name = str(stage.recipe)
    reached = note.reached(name, digest)
    if reached == "done":
        say(f"{name}: is done")
        return 0
    if reached != "trained":
        note.reach(name, digest, "begun")
        code = subprocess.run(stage.command(reached), check=False).returncode
        if code:
            return code
        note.reach(name, digest, "trained")
    run = stage.open()
    code = mine(run) if getattr(run.config, "mine", None) is not None else 0
    if not code:
        note.reach(name, digest, "done")
    return code
