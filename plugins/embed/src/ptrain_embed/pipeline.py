"""Recipes one after the other: each is run, and then mined from, in processes that may be stopped at any time."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ptrain
from ptrain_embed.vectors import read_note, write_note

if TYPE_CHECKING:
    from ptrain import Run

RUNS = Path("runs")
PTRAIN = [sys.executable, "-m", "ptrain_cli"]
"""The command line."""
GUARD = [sys.executable, "-m", "ptrain.launch.guard", "exec"]
"""Runs a command that dies with the process whose number stands before it."""
REQUESTS = (signal.SIGINT, signal.SIGTERM)


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

    def train(self, flags: Sequence[str]) -> int:
        """Run it; the exit code."""
        workers = ["--workers", str(self.workers)] if self.workers else []
        return called(["run", *self._words, *workers, *flags])

    def mine(self) -> int:
        """Mine as it says, if it does; the exit code."""
        return called(["embed", "mine", *self._words]) if getattr(self.open().config, "mine", None) is not None else 0

    def runs(self) -> set[str]:
        """What tells each run of it from any other that is or will be there."""
        run = self.open()
        folders = (RUNS / self.recipe.stem).glob("*") if run.recipe.output_dir is None else [run.dir]
        return {f"{path.name} {path.stat().st_ino}" for path in folders if (path / "run.json").is_file()}

    def digest(self) -> str:
        """Changes with what the recipe says."""
        said = "\0".join([self.recipe.read_text(encoding="utf-8"), *self.overrides])
        return hashlib.blake2b(said.encode(), digest_size=12).hexdigest()

    @property
    def _words(self) -> list[str]:
        return [str(self.recipe), *(word for one in self.overrides for word in ("-o", one))]


def called(words: Sequence[str]) -> int:
    """Call `ptrain` with these words; its exit code when it has ended.

    It has a session of its own, so that a request to stop, wherever it comes from, reaches it once, from here: a second
    one would end it without saving. Whatever ends this process ends it too.
    """
    command = [*GUARD, str(os.getpid()), *PTRAIN, *words]
    with subprocess.Popen(command, start_new_session=True) as process:
        former = {one: signal.signal(one, lambda number, _: process.send_signal(number)) for one in REQUESTS}
        try:
            code = process.wait()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def run_stages(stages: Sequence[Stage], say: Callable[[str], None]) -> int:
    """Do what is not done yet of each stage; return the exit code of the first that fails, or 0.

    What is done is noted in the folder `runs`; a recipe that has changed is run anew, and so are those after it.

    Raises:
        PtrainError: a recipe is wrong; nothing was run.
    """
    for stage in stages:
        stage.open()
    note = Note(RUNS / f"pipeline-{'-'.join(stage.recipe.stem for stage in stages)}.json")
    before = ""
    for stage in stages:
        before = hashlib.blake2b(f"{before} {stage.digest()}".encode(), digest_size=12).hexdigest()
        code = _complete(stage, before, note, say)
        if code:
            say(f"{stage.recipe}: exit code {code}; the same command goes on from here")
            return code
    return 0


class Note:
    """How far each recipe of a pipeline has got, by its name.

    Of each: `digest`, of it and those before it; `reached` (`begun`, `trained` or `done`); `flags`, with which its run
    begins; `before`, the runs of it that were there already.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._state = path, read_note(path)

    def of(self, name: str) -> dict[str, Any]:
        """What is noted of a recipe; nothing where it was never begun."""
        return self._state.get(name, {})

    def write(self, name: str, **changes: Any) -> None:
        """Note changes of what is said of a recipe."""
        self._state[name] = {**self.of(name), **changes}
        self._path.parent.mkdir(exist_ok=True)
        write_note(self._path, self._state)


def _complete(stage: Stage, digest: str, note: Note, say: Callable[[str], None]) -> int:
    """Do what is left of a stage; its exit code."""
    name = str(stage.recipe)
    known = note.of(name)
    if known.get("digest") != digest:
        flags = ["--restart"] if known else []
        note.write(name, digest=digest, reached="begun", flags=flags, before=sorted(stage.runs()))
    reached = note.of(name)["reached"]
    if reached == "done":
        say(f"{name}: is done")
        return 0
    code = _train(stage, note.of(name)) if reached == "begun" else 0
    if not code:
        note.write(name, reached="trained")
        code = stage.mine()
    if not code:
        note.write(name, reached="done")
    return code


def _train(stage: Stage, known: dict[str, Any]) -> int:
    """Begin its run, or go on with it."""
    # One that was stopped before it had a folder has to begin again: there may be an older run to resume by mistake.
    begun = stage.runs() - set(known["before"])
    return stage.train(["--resume"] if begun else known["flags"])
