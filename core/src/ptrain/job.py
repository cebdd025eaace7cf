"""From a loaded recipe to a trained model: prepare once a run, then work in every worker."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.directory import (
    KILL_SWITCH,
    SPEC,
    check_directory,
    hold,
    make_directory,
    release,
    run_directory,
    set_aside,
    sign,
    starts,
    write_spec,
)
from ptrain.errors import RecipeError
from ptrain.launch import hang
from ptrain.recipe.dump import dump
from ptrain.recipe.env import resolve, value_of
from ptrain.recipe.load import Loaded, load_recipe
from ptrain.recipe.machine import machine_problems

if TYPE_CHECKING:
    from ptrain.data.cache import Prepared
    from ptrain.launch.failure import Failure
    from ptrain.recipe.sections import Recipe
    from ptrain.run import Run

STOPPED = 75
"""Exit code of a run that a signal or the kill switch ended, after saving (EX_TEMPFAIL: start it again)."""


def prepare_run(
    loaded: Loaded,
    source: Path | None,
    *,
    resume: bool = False,
    restart: bool = False,
    command: Sequence[str] = (),
    workers: int = 1,
) -> Path:
    """Prepare data, check model and disk, make the run directory; return the file that workers start from.

    This process holds the run directory from then on, see `ptrain.directory.hold`.

    Args:
        source: the path of the recipe, after which the run directory is named.
        command: what the user typed, for the hint on how to go on.
        workers: of the whole run.

    Raises:
        PtrainError: something is wrong; nothing was written to the run directory but its lock.
    """
    from ptrain import checks
    from ptrain.run import Run
    from ptrain.saving import resumes_by_itself

    problems = machine_problems(loaded)
    if problems:
        raise RecipeError.of(problems)
    _check_environment(loaded.recipe)
    resume = not restart and (resume or resumes_by_itself(loaded.recipe))
    directory = run_directory(loaded.recipe, source, resume=resume)
    new = not directory.exists()
    check_directory(directory, resume=resume, restart=restart)
    if not new:
        hold(directory)
    try:
        run = Run(loaded, directory, world=workers, trains=True, data_world=workers)
        run.recipe_hash = checks.recipe_hash(loaded, run.recipe)
        prepared, resume_from = _checked(run, resume=resume, restart=restart)
        if restart and not new:
            release(set_aside(directory))
            new = True
        make_directory(directory, new=new)
        if new:
            hold(directory)
        return _begun(run, prepared, source, resume_from, command)
    except BaseException:
        release(directory)
        raise


def _checked(run: Run, *, resume: bool, restart: bool) -> tuple[Prepared, Path | None]:
    """The prepared data and the checkpoint to go on from, after all that can be said before anything is written."""
    from ptrain import checks
    from ptrain.model import adapters

    directory = run.dir
    checks.check_paths(run)
    if resume:
        checks.check_same_recipe(run)
    prepared = _prepared(run)
    checks.check_evaluation(run, prepared.eval)
    resume_from = _resume_from(run, prepared.digest()) if resume else None
    if resume_from is None:
        checks.check_rows(run, len(prepared.train))
        if not (resume and (directory / SPEC).exists()):
            checks.check_checkpoint_folders(run, moved=directory if restart else None)
    checks.check_model(run)
    checks.check_given(run, prepared.report)
    checks.check_evaluators(run, prepared.eval)
    checks.check_packing(run, prepared.train)
    model = checks.blank_model(run)
    if resume_from is not None:
        checks.check_same_model(run, resume_from, model)
    checks.check_positions(run, [prepared.train, prepared.eval], model)
    adapters.check_tokens(run, model)
    checks.check_space(run, directory, sum(p.numel() for p in model.parameters() if p.requires_grad))
    return prepared, resume_from


def _check_environment(recipe: Recipe) -> None:
    """Raise RecipeError where what belongs to no part refers to a variable that is not set."""
    for key in ("output_dir", "train_log_metrics_path", "kill_switch_path", "deepspeed"):
        value_of(getattr(recipe, key), key)
    value_of(recipe.logger.output_dir, "logger.output_dir")
    for section in (recipe.trainer, recipe.wandb, *recipe.plugins.values()):
        resolve(section)


def _resume_from(run: Run, data: str) -> Path | None:
    """The checkpoint to go on from, if there is one: made by this recipe, with rows of this digest."""
    from ptrain import checks
    from ptrain.saving import resume_point

    checks.check_same_data(run, data)
    found = resume_point(run)
    if found is not None:
        checks.check_same_run(run, found, data)
    return found


def _begun(run: Run, prepared: Prepared, source: Path | None, resume_from: Path | None, command: Sequence[str]) -> Path:
    """Write down what is begun, in the run directory; return the file that workers start from."""
    directory, user = run.dir, run.loaded.user_code
    (directory / KILL_SWITCH).unlink(missing_ok=True)  # it ended the run before
    sign(directory)
    run.say(f"run directory: {directory}")
    spec = {
        "recipe": dump(run.recipe),
        "recipe_hash": run.recipe_hash,
        "code": str(user.path) if user is not None and user.path is not None else None,
        "prepared": str(prepared.path),
        "data": prepared.digest(),
        "report": prepared.report,
        "resume_from": str(resume_from) if resume_from is not None else None,
        "seed": run.recipe.seed,
        "command": list(command),
        "starts": starts(directory, command, source.parent if source is not None else Path()),
    }
    return write_spec(directory, spec, dump(run.recipe, defaults=True), user.text if user is not None else "")


def prepare_data(loaded: Loaded, directory: Path) -> tuple[Run, Prepared]:
    """A run of its own that loads, splits, processes and caches the data, and the prepared folder."""
    from ptrain.run import Run

    run = Run(loaded, directory)
    return run, _prepared(run)


def _prepared(run: Run) -> Prepared:
    from ptrain.data.cache import prepare

    prepared = prepare(run)
    for line in prepared.lines():
        run.say(line)
    return prepared


def work(spec: Path, stop: Any = None, hung: Callable[[Failure], object] | None = None) -> int:
    """Train in this worker; return its exit code. `hung` is called, from another thread, where it does not go on."""
    from ptrain import engine, loop

    started = time.perf_counter()
    run = open_spec(spec, stop)
    limit = hang.limit(run.recipe.hang_timeout, run.world)
    with observed(run), hang.watched(limit, run.rank, hung) if hung and limit else contextlib.nullcontext():
        outcome = loop.train(run)
    run.say(closing_line(run, outcome, time.perf_counter() - started), whole=True)
    engine.close()
    return STOPPED if outcome == "stopped" else 0


@contextlib.contextmanager
def observed(run: Run) -> Iterator[None]:
    """Within it, what fails is told to the observers; at its end the display and the trackers are finished."""
    try:
        yield
    except BaseException as error:
        run.call("on_exception", error=error)
        raise
    finally:
        run.trackers.finish(run)


def open_spec(spec: Path, stop: Any = None, plugins: Sequence[Any] = ()) -> Run:
    """The run of this worker with everything in place for the first step (or the one to resume at).

    Args:
        spec: the file that `prepare_run` left.
        plugins: what `load_recipe` was given of this process besides; no file knows of it.
    """
    from ptrain import setup

    content = json.loads(spec.read_text(encoding="utf-8"))
    code = Path(content["code"]) if content["code"] else None
    loaded = load_recipe(content["recipe"], code=code, allow_code=code is not None, plugins=plugins)
    run = setup.new_run(loaded, spec.parent, content, stop)
    setup.build(run, Path(content["prepared"]), Path(content["resume_from"]) if content["resume_from"] else None)
    return run


def closing_line(run: Run, outcome: str, seconds: float) -> str:
    """What happened, where everything is, and what to do next."""
    from ptrain.saving import newest_export, newest_other

    took = f"{run.progress.step}/{run.total_steps} steps in {seconds:.0f} s"
    if outcome != "done":
        again = shlex.join([*_typed(run), "--resume"]) if run.command else "the same call with resume"
        if outcome == "exit_iteration" and run.recipe.exit_iteration:
            again += " -o exit_iteration=0"
        return f"{outcome.replace('_', ' ')} after {took}; everything is in {run.dir}; go on with: {again}"
    model, other = newest_export(run), newest_other(run)
    if model is None and other is not None:
        part, path = other
        return f"done: {took}; everything is in {run.dir}; {part.folder}: {path}; next: {part.advice(path)}"
    where = f"; model: {model}" if model is not None else ""
    return f"done: {took}; everything is in {run.dir}{where}; next: {_next(run, model)}"


def _next(run: Run, model: Path | None) -> str:
    """What to do with what came out, as a command where it is one."""
    from ptrain.model import adapters
    from ptrain.saving import active

    if model is None:
        kind = run.parts.model.exported_as
        export = f"checkpoint.{len(run.recipe.checkpoint)}={{type: {kind}, save_end_of_training: true}}"
        return f"to keep a model that others can load, {_again(run, export)}"
    if any(source.type == "tasks" for source in run.recipe.data.sources):
        return f"to train on rows of your own, {_again(run, 'data.sources=[{type: jsonl, path: rows.jsonl}]')}"
    if (model / adapters.CONFIG).is_file():
        return f"to have one model with the adapter in it: ptrain export {shlex.quote(str(run.dir))} --merge"
    if advice := next((said for part in active(run) if (said := part.advice(model))), None):
        return advice
    module = run.parts.model.registered_by
    first = f" after `import {module}`" if module else ""
    return f"load it with {run.parts.model.auto(run.hf_config)}.from_pretrained({str(model)!r}){first}"


def _again(run: Run, override: str) -> str:
    if not run.command:
        return f"the same call with the override {override!r}"
    # The default run directory is a new one each time.
    anew = ["--restart"] if run.recipe.output_dir is not None else []
    return shlex.join([*_typed(run), *anew, "-o", override])


def _typed(run: Run) -> list[str]:
    return [word for word in run.command if word not in ("--resume", "--restart")]
