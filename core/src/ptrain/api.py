"""The Python way: `ptrain.train` runs a recipe, `ptrain.open_run` lets you drive its steps by hand.

`ptrain.open_recipe` is for tools that only read one.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.errors import RecipeError, TrainingError
from ptrain.launch.environment import Topology
from ptrain.recipe.sections import Recipe

if TYPE_CHECKING:
    from types import TracebackType

    from ptrain.recipe.load import Loaded
    from ptrain.results import StepResult
    from ptrain.run import Run

Source = str | Path | Mapping[str, Any] | Recipe
Overrides = Mapping[str, Any] | Sequence[str]


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        dir: the run directory.
        outcome: "done", "stopped" or "exit_iteration".
        steps: optimizer steps done.
        metrics: the last value of every metric; those of evaluations begin with `eval/`.
        model: the newest export for others to load, if the recipe asks for one.
    """

    dir: Path
    outcome: str
    steps: int
    metrics: dict[str, Any]
    model: Path | None = None


def train(
    recipe: Source,
    overrides: Overrides = (),
    *,
    code: Path | str | None = None,
    plugins: Sequence[Any] = (),
    resume: bool = False,
    restart: bool = False,
) -> Result:
    """Train in this process and return what came out.

    In a process that a launcher started (torchrun, Slurm, Ray), it is one worker of several: each calls this.

    Args:
        recipe: the path of a recipe, its content as a mapping, or a `ptrain.Recipe`.
        overrides: `{"optimizer.lr": 2e-5}`, or `["optimizer.lr=2e-5"]`.
        code: a file of user code.
        plugins: instead of it, functions of your own, marked with `hookimpl` or `callback`.
        resume: go on from the newest checkpoint of the run directory.
        restart: begin anew; an earlier run directory is renamed.

    Raises:
        PtrainError: with what is wrong and how to mend it.
    """
    from ptrain import loop
    from ptrain.directory import release
    from ptrain.job import observed
    from ptrain.saving import newest_export

    run = _ready(recipe, overrides, code, plugins, resume, restart)
    try:
        with observed(run):
            outcome = loop.train(run)
    finally:
        release(run.dir)
    return Result(run.dir, outcome, run.progress.step, dict(run.trackers.last), newest_export(run))


def open_run(
    recipe: Source,
    overrides: Overrides = (),
    *,
    code: Path | str | None = None,
    plugins: Sequence[Any] = (),
    resume: bool = False,
    restart: bool = False,
) -> OpenRun:
    """A run with everything in place for its first step, to drive by hand; the arguments are those of `train`.

        with ptrain.open_run("recipe.yaml") as session:
            for result in session:
                if result.loss < 0.5:
                    break
            session.save()

    Raises:
        PtrainError: with what is wrong and how to mend it.
    """
    session = OpenRun(_ready(recipe, overrides, code, plugins, resume, restart))
    try:
        session.run.call("before_training")
        session.run.call("on_start")
    except BaseException as error:
        session.__exit__(type(error), error, error.__traceback__)
        raise
    return session


class OpenRun:
    """A run whose steps you drive; on several workers, each has to make the same calls.

    Iterate over it for all steps that are left. Nothing is evaluated or saved unless you ask.

    Attributes:
        run: the run itself, as hooks get it: `run.model`, `run.tokenizer`, `run.progress`, `run.recipe`, ...
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._stream = iter(run.train_loader)
        self._open = True

    def step(self) -> StepResult:
        """Do the next optimizer step and return its loss and metrics.

        Raises:
            TrainingError: all steps are done, or the run is closed.
        """
        from ptrain import loop

        if not self._open:
            raise TrainingError("the run is closed", fix="open it again, with `resume=True` to go on from a checkpoint")
        if self.run.progress.step >= self.run.total_steps:
            raise TrainingError(
                f"all {self.run.total_steps} steps are done", fix="raise `epochs` or `train_iters` in the recipe"
            )
        return loop.one_step(self.run, self._stream)

    def __iter__(self) -> Iterator[StepResult]:
        """Do all steps that are left, one after the other."""
        while self.run.progress.step < self.run.total_steps:
            yield self.step()

    def evaluate(self) -> dict[str, float]:
        """Run every evaluator of the recipe now; return what they found, nothing where there are no rows for it."""
        from ptrain import loop

        return loop.evaluate(self.run)

    def save(self) -> list[Path]:
        """Write each checkpoint of the recipe now, or a resumable one where it names none; return where they are."""
        from ptrain import saving

        return [saving.save(self.run, part) for part in saving.active(self.run) or [saving.resumable(self.run)]]

    def close(self) -> None:
        """End the run: the display and trackers are finished. Nothing is saved."""
        from ptrain.directory import release

        if not self._open:
            return
        self._open = False
        try:
            self.run.call("on_end")
            self.run.trackers.finish(self.run)
        finally:
            release(self.run.dir)

    def __enter__(self) -> OpenRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.run.call("on_exception", error=error)
        self.close()


def open_recipe(
    recipe: Source,
    overrides: Overrides = (),
    *,
    code: Path | str | None = None,
    plugins: Sequence[Any] = (),
) -> Run:
    """The run of a recipe of which nothing has been done yet, for tools: its sections and parts, checked.

    Nothing is prepared, loaded or written; `run.call("load", source=run.parts.sources[0])`, say, gives the rows of a
    source. The arguments are those of `train`.

    Raises:
        PtrainError: with what is wrong in the recipe and how to mend it.
    """
    from ptrain.directory import run_directory
    from ptrain.run import Run

    loaded, source = _loaded(recipe, overrides, code, plugins)
    return Run(loaded, run_directory(loaded.recipe, source, resume=False))


def _ready(
    recipe: Source, overrides: Overrides, code: Path | str | None, plugins: Sequence[Any], resume: bool, restart: bool
) -> Run:
    from ptrain import engine
    from ptrain.directory import release
    from ptrain.job import open_spec, prepare_run
    from ptrain.launch.together import prepare_together

    loaded, source = _loaded(recipe, overrides, code, plugins)
    topology = Topology.from_environment(os.environ)
    if topology.is_worker:
        os.environ.update(topology.environment())
    spec = prepare_together(
        topology, lambda: prepare_run(loaded, source, resume=resume, restart=restart, workers=topology.world)
    )
    # DeepSpeed does not join a second process group, so this one stays for the next call.
    atexit.register(engine.close)
    try:
        return open_spec(spec, plugins=plugins)
    except BaseException:
        release(spec.parent)
        raise


def _loaded(
    recipe: Source, overrides: Overrides, code: Path | str | None, plugins: Sequence[Any]
) -> tuple[Loaded, Path | None]:
    """The recipe, checked, and the file that it is in, if it is in one."""
    from ptrain.recipe.dump import dump
    from ptrain.recipe.load import load_recipe

    source = None if isinstance(recipe, (Mapping, Recipe)) else Path(recipe)
    content = dump(recipe) if isinstance(recipe, Recipe) else recipe
    listed = [_override(k, v) for k, v in overrides.items()] if isinstance(overrides, Mapping) else overrides
    loaded = load_recipe(
        content if source is None else source,
        list(listed),
        code=Path(code) if code is not None else None,
        allow_code=code is not None,
        plugins=plugins,
    )
    return loaded, source


def _override(key: str, value: Any) -> str:
    """The override as the command line has it."""
    try:
        return f"{key}={json.dumps(value, default=os.fspath)}"
    except TypeError:
        raise RecipeError(
            f"the override `{key}` is {value!r}, of the type {type(value).__name__}",
            expected="text, a number, a truth value, None, a path, or a list or mapping of such",
        ) from None
