"""The run directory: where it is, which of several a run goes on in, and what is written down of a start."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ptrain.errors import RecipeError
from ptrain.recipe.env import value_of
from ptrain.versions import versions

RUNS = Path("runs")
SPEC = "run.json"
KILL_SWITCH = "stop"
"""The file in the run directory that ends the run, where the recipe names no other."""
LATEST = "latest"
"""A link beside the directories of a recipe's runs, to the newest."""
LOCK = ".lock"
"""The file in the run directory that the process which trains there has locked."""
TIME = "%Y-%m-%dT%H-%M-%SZ"
"""UTC, so that names sort as they were made, everywhere and in every season."""
OURS = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ(-\d+)?")


def run_directory(recipe: Any, source: Path | None, *, resume: bool = False) -> Path:
    """Where a run of this recipe keeps its files: `output_dir`, or `runs/<name of the recipe>/<time>`.

    Args:
        source: the path of the recipe; without one it is called after its trainer.
        resume: take the newest directory that there is already.
    """
    if recipe.output_dir is not None:
        with contextlib.suppress(RecipeError):  # as in a recipe that is only looked at
            return value_of(Path(recipe.output_dir), "output_dir").absolute()
        return Path(recipe.output_dir).absolute()
    parent = (RUNS / (source.stem if source is not None else recipe.type)).absolute()
    newest = newest_run(parent) if resume else None
    return newest or _free(parent / datetime.datetime.now(datetime.timezone.utc).strftime(TIME))


def newest_run(parent: Path) -> Path | None:
    """The newest directory of a run in `parent`, or None."""
    if not parent.is_dir():
        return None
    found = [path for path in parent.iterdir() if OURS.fullmatch(path.name) and (path / SPEC).is_file()]
    return max(found, key=_order, default=None)


def _order(path: Path) -> tuple[str, int]:
    time, _, number = path.name.partition("Z-")
    return time.removesuffix("Z"), int(number or 1)


def _free(path: Path) -> Path:
    """`path`, or with a number behind it the first that is not there yet."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def check_directory(directory: Path, *, resume: bool, restart: bool) -> None:
    """Raise RecipeError where the run directory can't be used.

    It can't be made or written, or it belongs to a run that was not asked to be resumed.
    """
    parent = directory
    while not parent.exists():
        parent = parent.parent
    try:
        # Whether it can be written depends on more than its permissions: the file system, its mount, a quota.
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise RecipeError(
            f"the run directory `{directory}` can't be written: `{parent}`: {error.strerror}",
            fix="set `output_dir` to a folder that you may write to",
        ) from None
    if restart or not directory.exists() or all(path.name == LOCK for path in directory.iterdir()):
        return
    if not resume:
        raise RecipeError(
            f"the run directory `{directory}` is not empty",
            fix="add `--resume` to go on with that run, `--restart` to begin anew (the old one is renamed), "
            "or `-o output_dir=...`",
        )


def make_directory(directory: Path, *, new: bool) -> None:
    """Make the run directory.

    Args:
        new: it was not there when it was chosen.

    Raises:
        RecipeError: it was new, and another run has made it in the meantime.
    """
    try:
        directory.mkdir(parents=True, exist_ok=not new)
    except FileExistsError:
        raise RecipeError(
            f"another run has begun in `{directory}` while this one was prepared", fix="start this one again"
        ) from None


_held: dict[Path, IO[str] | None] = {}
"""The files that this process has locked, by run directory; None where the file system has no locks."""
_holders: Counter[Path] = Counter()
"""The runs of this process in each."""


def hold(directory: Path) -> None:
    """Keep the runs of other processes out of a run directory, until `release` or the end of this process.

    Two runs in one directory would overwrite each other's checkpoints. A lock of the system, rather than the file
    alone, so that a killed run keeps nobody out. On a file system without locks, nobody is kept out.

    Raises:
        RecipeError: another process trains there.
    """
    if directory not in _held:
        _held[directory] = _locked(directory)
    _holders[directory] += 1


def _locked(directory: Path) -> IO[str] | None:
    import fcntl

    try:
        file = (directory / LOCK).open("a+", encoding="utf-8")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        who = file.read().strip()
        file.close()
        if not isinstance(error, BlockingIOError):
            return None
        raise RecipeError(
            f"another process{f' ({who})' if who else ''} is training in `{directory}`",
            fix="wait for its end, or set another `output_dir`",
        ) from None
    return file


def sign(directory: Path) -> None:
    """Say in the lock of a run directory, for those whom it keeps out, which process holds it."""
    file = _held[directory]
    with contextlib.suppress(OSError):  # a full disk
        if file is not None:
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}\n")
            file.flush()


def release(directory: Path) -> None:
    """Let the runs of other processes into a run directory again, if this one held it for one run alone."""
    _holders[directory] -= 1
    if _holders[directory] < 1:
        del _holders[directory]
        _close(_held.pop(directory, None))


def _close(file: IO[str] | None) -> None:
    if file is not None:
        with contextlib.suppress(OSError):  # what a full disk did not take
            file.close()


def _let_go() -> None:
    """In a process that was forked: it may outlive this one for seconds, and would keep others out."""
    for file in _held.values():
        _close(file)
    _held.clear()
    _holders.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def set_aside(path: Path) -> Path:
    """Rename a run directory, which stays held if it was, or a file, to the next free `<name>.N` and return that."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)
    if path in _held:
        _held[aside], _holders[aside] = _held.pop(path), _holders.pop(path)
    return aside


def write_spec(directory: Path, spec: Mapping[str, Any], resolved: Mapping[str, Any], code: str = "") -> Path:
    """Write the recipe for people and everything for workers (`run.json`); return the latter.

    Args:
        spec: what workers start from; its `recipe` holds the keys that were given.
        resolved: the recipe with every key.
        code: the text of the user's own.
    """
    from ptrain.recipe import yaml12

    (directory / "recipe.yaml").write_text(yaml12.write(spec["recipe"]), encoding="utf-8")
    (directory / "resolved.yaml").write_text(yaml12.write(resolved), encoding="utf-8")
    if code:
        (directory / "code.py").write_text(code, encoding="utf-8")
    path = directory / SPEC
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(spec, indent=1), encoding="utf-8")
    temporary.replace(path)
    if OURS.fullmatch(directory.name):
        _point(directory)
    return path


def _point(directory: Path) -> None:
    """Let `latest` be this directory; some file systems have no links, and nothing depends on it."""
    link = directory.with_name(f"{LATEST}.{os.getpid()}")
    with contextlib.suppress(OSError):
        link.symlink_to(directory.name)
        link.replace(directory.with_name(LATEST))


def starts(directory: Path, command: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Every start of this run, this one last: when, the command, the versions and the commit.

    Args:
        folder: of the recipe, whose repository is meant.
    """
    path = directory / SPEC
    earlier = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.is_file() else []
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return [*earlier, {"time": now, "command": list(command), "git": commit(folder), "versions": versions()}]


def commit(folder: Path) -> dict[str, Any] | None:
    """The commit of the repository that a folder is in, and whether tracked files differ from it; or None."""

    def git(*words: str) -> str:
        return subprocess.run(
            # A repository may name programs to run for `status`; none of them is wanted.
            ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        found = git("rev-parse", "HEAD")
        return {"commit": found, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def free_bytes(path: Path) -> int:
    """Free space of the disk that `path` (or its nearest existing parent) is on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
