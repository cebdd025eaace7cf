"""From a loaded recipe to a trained model: prepare once a machine, then work in every worker."""

from __future__ import annotations

import atexit
import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.errors import PtrainError, RecipeError
from ptrain.launch.environment import Topology
from ptrain.recipe.dump import dump
from ptrain.recipe.load import Loaded, load_recipe
from ptrain.recipe.machine import machine_problems
from ptrain.versions import versions

if TYPE_CHECKING:
    from ptrain.run import Run

STOPPED = 75
"""Exit code of a run that a signal or the kill switch ended, after saving (EX_TEMPFAIL: start it again)."""
SPEC = "run.json"
KILL_SWITCH = "stop"
"""The file in the run directory that ends the run, where the recipe names no other."""
NEXT = "your own rows, with --restart -o 'data.sources=[{type: jsonl, path: rows.jsonl}]'"
"""What the closing line suggests."""


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        dir: the run directory.
        outcome: "done", "stopped" or "exit_iteration".
        steps: optimizer steps done.
        metrics: the last value of every metric.
    """

    dir: Path
    outcome: str
    steps: int
    metrics: dict[str, Any]


def run_directory(recipe: Any, source: Path | None) -> Path:
    """Where a run of this recipe keeps its files."""
    stem = source.stem if source is not None else recipe.type
    return Path(recipe.output_dir or Path("runs") / stem).expanduser()


def prepare_run(
    loaded: Loaded, source: Path | None, *, resume: bool = False, restart: bool = False, command: Sequence[str] = ()
) -> Path:
    """Prepare data, check model and disk, make the run directory; return the file that workers start from.

    Args:
        source: the path of the recipe, after which the run directory is named.
        command: what the user typed, for the hint on how to go on.

    Raises:
        PtrainError: something is wrong; nothing was written to the run directory.
    """
    from ptrain import checks
    from ptrain.saving import resume_point, resumes_by_itself

    problems = machine_problems(loaded)
    if problems:
        raise RecipeError.of(problems)
    directory = run_directory(loaded.recipe, source).absolute()
    resume = not restart and (resume or resumes_by_itself(loaded.recipe))
    checks.check_directory(directory, resume=resume, restart=restart)
    run, prepared = prepare_data(loaded, directory)
    run.recipe_hash = checks.recipe_hash(loaded, run.recipe)
    resume_from = None
    if resume:
        checks.check_same_recipe(run, prepared.digest())
        resume_from = resume_point(run)
    if resume_from is not None:
        checks.check_same_run(run, resume_from, prepared.digest())
    elif not (resume and (directory / SPEC).exists()):
        checks.check_checkpoint_folders(run, moved=directory if restart else None)
    checks.check_model(run)
    checks.check_packing(run, prepared.train)
    checks.check_space(run, directory, checks.count_parameters(run))
    if restart and directory.exists():
        set_aside(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / KILL_SWITCH).unlink(missing_ok=True)  # it ended the run before
    user = loaded.user_module
    spec = {
        "recipe": dump(run.recipe),
        "recipe_hash": run.recipe_hash,
        "code": str(Path(user.__file__).absolute()) if user is not None and user.__file__ else None,
        "prepared": str(prepared.path),
        "data": prepared.digest(),
        "report": prepared.report,
        "resume_from": str(resume_from) if resume_from is not None else None,
        "command": list(command),
        "environment": versions(),
    }
    return write_spec(directory, spec)


def write_spec(directory: Path, spec: Mapping[str, Any]) -> Path:
    """Write the resolved recipe for people (`recipe.yaml`) and everything for workers (`run.json`)."""
    from ptrain.recipe import yaml12

    (directory / "recipe.yaml").write_text(yaml12.write(spec["recipe"]), encoding="utf-8")
    path = directory / SPEC
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(spec, indent=1), encoding="utf-8")
    temporary.replace(path)
    return path


def set_aside(directory: Path) -> Path:
    """Rename a run directory to the next free `<name>.N` and return that."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    return directory.rename(aside)


def prepare_data(loaded: Loaded, directory: Path) -> tuple[Run, Any]:
    """A run of its own that loads, splits, processes and caches the data, and the prepared folder."""
    from ptrain.data.cache import prepare
    from ptrain.run import Run

    run = Run(loaded, directory)
    prepared = prepare(run)
    for line in prepared.lines():
        run.say(line)
    return run, prepared


def work(spec: Path, stop: Any = None) -> int:
    """Train in this worker; return its exit code."""
    from ptrain import engine, loop

    started = time.perf_counter()
    run = open_run(spec, stop)
    try:
        outcome = loop.train(run)
    except BaseException as error:
        run.call("on_exception", error=error)
        raise
    finally:
        run.trackers.finish(run)
    run.say(closing_line(run, outcome, time.perf_counter() - started))
    engine.close()
    return STOPPED if outcome == "stopped" else 0


def open_run(spec: Path, stop: Any = None) -> Run:
    """The run of this worker with everything in place for the first step (or the one to resume at)."""
    from ptrain import setup

    content = json.loads(spec.read_text(encoding="utf-8"))
    code = Path(content["code"]) if content["code"] else None
    loaded = load_recipe(content["recipe"], code=code, allow_code=code is not None)
    run = setup.new_run(loaded, spec.parent, content, stop)
    setup.build(run, Path(content["prepared"]), Path(content["resume_from"]) if content["resume_from"] else None)
    return run


def closing_line(run: Run, outcome: str, seconds: float) -> str:
    """What happened, where everything is, and what to do next."""
    from ptrain.saving import newest_export

    took = f"{run.progress.step}/{run.total_steps} steps in {seconds:.0f} s"
    if outcome != "done":
        typed = [word for word in run.command if word not in ("--resume", "--restart")]
        again = shlex.join([*typed, "--resume"]) if typed else "the same call with resume"
        if outcome == "exit_iteration" and run.recipe.exit_iteration:
            again += " -o exit_iteration=0"
        return f"{outcome.replace('_', ' ')} after {took}; everything is in {run.dir}; go on with: {again}"
    model = newest_export(run)
    where = f"; model: {model}" if model is not None else ""
    return f"done: {took}; everything is in {run.dir}{where}; next: {NEXT}"


def train(
    recipe: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    code: Path | None = None,
    resume: bool = False,
    restart: bool = False,
) -> Result:
    """Train in this process and return what came out: the Python way to `ptrain run`.

    Args:
        recipe: the path of a recipe, or its content as a mapping.
        overrides: `{"optimizer.lr": 2e-5}`, or `["optimizer.lr=2e-5"]`.
        code: a file of user code.
        resume: go on from the newest checkpoint of the run directory.
        restart: begin anew; an earlier run directory is renamed.

    Raises:
        PtrainError: with what is wrong and how to mend it.
    """
    source = None if isinstance(recipe, Mapping) else Path(recipe)
    listed = [f"{k}={json.dumps(v)}" for k, v in overrides.items()] if isinstance(overrides, Mapping) else overrides
    loaded = load_recipe(recipe if source is None else source, list(listed), code=code, allow_code=code is not None)
    spec = prepare_run(loaded, source, resume=resume, restart=restart)
    from ptrain import engine, loop

    # DeepSpeed does not join a second process group, so this one stays for the next call.
    atexit.register(engine.close)
    run = open_run(spec)
    try:
        outcome = loop.train(run)
    finally:
        run.trackers.finish(run)
    return Result(run.dir, outcome, run.progress.step, dict(run.trackers.last))


def topology() -> Topology:
    """This process among all workers."""
    return Topology.from_environment(os.environ)


def free_bytes(path: Path) -> int:
    """Free space of the disk that `path` (or its nearest existing parent) is on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


__all__ = ["PtrainError", "Result", "prepare_run", "train", "work"]
