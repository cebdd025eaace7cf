"""`Study`: what the checks look at, a plugin and its real runs; each is made when a check first needs it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.errors import PluginError, PtrainError, RecipeError
from ptrain.testing import runs
from ptrain.testing.check import NotApplicable
from ptrain.testing.finished import Finished
from ptrain.testing.recipes import EXPORT, KNOWN, Material, merged
from ptrain.testing.rows import SHAPES
from ptrain.testing.workers import WorkerFailed, run_workers

if TYPE_CHECKING:
    from ptrain.catalog import Offer
    from ptrain.recipe.load import Loaded

Changes = Mapping[str, Any] | Callable[[Path], Mapping[str, Any]] | None
STEPS, CUT = 6, 3
"""Optimizer steps of a run, and of one that is cut off: within the second epoch, and within the first."""
WHOLE = "whole"
BASE: dict[str, Any] = {
    "data": {"train_eval_split": [0.8, 0.2]},
    "train_iters": STEPS,
    "eval_at_start": True,
    "eval_interval": 2,
    "scheduler": {},
}
"""What every run of a study has."""
KEYS = "give the check the keys that it needs: `recipe` of `contract`, `-o` or `--recipe` of `ptrain plugins check`"
TRAINER = "sft"
"""With this trainer everything is tried that is no trainer."""


class Study:
    """A plugin that is checked.

    Attributes:
        kind, name: of the plugin.
        folder: for data and runs.
    """

    def __init__(self, kind: str, name: str, changes: Changes, folder: Path, model: Path) -> None:
        self.kind, self.name, self.folder = kind, name, folder
        self._changes = changes(folder) if callable(changes) else changes or {}
        self.material = Material(folder, model)
        self._runs: dict[str, Finished | PtrainError] = {}

    @functools.cached_property
    def offer(self) -> Offer:
        """The offer that the name stands for.

        Raises:
            PluginError: there is none.
        """
        from ptrain.catalog import Catalog

        return Catalog.installed().find(self.kind, self.name)

    @functools.cached_property
    def cls(self) -> Any:
        """Its class.

        Raises:
            PluginError: it can't be imported.
        """
        from ptrain.catalog import Catalog

        return Catalog.installed().load(self.offer)

    @property
    def who(self) -> str:
        """How messages call it."""
        return f"{self.kind} `{self.offer.name}` ({self.offer.distribution} {self.offer.version})"

    def wrong(self, message: str, expected: str | None = None, fix: str | None = None) -> PluginError:
        """The error of a check that fails."""
        return PluginError(f"{self.who}: {message}", expected=expected, fix=fix)

    # Recipes

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """A tiny recipe with the plugin in it."""
        changes = merged(self._section(), self._changes)
        if self.kind != "trainer" or "sources" in changes.get("data", {}):
            return self._with_rows(None, changes)
        return self._with_rows(self._shape(changes), changes)

    def _with_rows(self, shape: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
        trainer = self.name if self.kind == "trainer" else str(changes.get("type", TRAINER))
        return self.material.recipe(trainer, shape, **merged(BASE, {k: v for k, v in changes.items() if k != "type"}))

    def _section(self) -> dict[str, Any]:
        """The part of a recipe that names the plugin."""
        entry = {"type": self.name}
        if self.kind == "source" and "path" in self.cls.Config.model_fields:
            entry["path"] = str(self.material.data())
        return {
            "trainer": {},
            "plugin": {"plugins": {self.name: {}}},
            "source": {"data": {"sources": [entry]}},
            "checkpoint": {"checkpoint": [entry, EXPORT]},
            "tracker": {"trackers": [entry]},
            "evaluator": {"evaluation": [entry]},
        }.get(self.kind, {self.kind: entry})

    def _shape(self, changes: Mapping[str, Any]) -> str:
        """The first shape of rows that can be prepared for a trainer."""
        shapes = [KNOWN[self.name]] if self.name in KNOWN else list(SHAPES)
        refused = []
        for shape in shapes:
            try:
                runs.prepare_rows(self._with_rows(shape, changes), self.folder / "rows")
            except RecipeError as error:
                raise self._refused(error) from None
            except PtrainError as error:
                refused.append(f"{shape}: {error.problems[0].message}")
            else:
                return shape
        raise self.wrong(
            "it can prepare none of the data that is made up here: " + "; ".join(refused),
            expected="rows of one of the shapes " + ", ".join(shapes),
            fix=f"{KEYS}; `data.sources` among them",
        )

    @functools.cached_property
    def loaded(self) -> Loaded:
        """The recipe, validated, with the classes that it chose.

        Raises:
            PluginError: it is wrong, or doesn't use the plugin.
        """
        from ptrain.recipe.load import load_recipe

        try:
            found = load_recipe(self._placed(self.recipe, "loaded"))
        except RecipeError as error:
            raise self._refused(error) from None
        if self.offer not in found.origins.values():
            raise self.wrong("the recipe of the check doesn't use it", fix="name it in `recipe`")
        return found

    def _refused(self, error: RecipeError) -> PluginError:
        return self.wrong(f"the tiny recipe with it is refused: {error}", fix=KEYS)

    # Runs

    def run(self, name: str, *, workers: int = 1, code: Path | None = None, resume: bool = False,
            **changes: Any) -> Finished:  # fmt: skip
        """A run of the recipe with `changes`, in the folder `name`; made once.

        Raises:
            PtrainError: it fails, now or when it was made.
        """
        if name != WHOLE:
            _ = self.reference  # what fails there need not be tried again
        key = f"{name} (resumed)" if resume else name
        if key not in self._runs:
            recipe = self._placed(merged(self.recipe, changes), name)
            try:
                self._runs[key] = runs.run(recipe, self.folder / name, workers=workers, resume=resume, code=code)
            except PtrainError as error:
                self._runs[key] = error
        found = self._runs[key]
        if isinstance(found, PtrainError):
            raise self._failed(found)
        return found

    def _placed(self, recipe: dict[str, Any], name: str) -> dict[str, Any]:
        """With a folder of its own for the checkpoints that are checked: an export lies beside them."""
        if self.kind != "checkpoint":
            return recipe
        first, *rest = recipe["checkpoint"]
        own = {"save_end_of_training": True, "output_dir": str(self.folder / f"{name}-saved"), **first}
        return {**recipe, "checkpoint": [own, *rest]}

    def _failed(self, error: PtrainError) -> PluginError:
        if isinstance(error, WorkerFailed):
            return self.wrong(f"a worker fails: {error}", "training to go through")
        return self.wrong(f"its run is refused: {error}", "a tiny recipe with it to run")

    @functools.cached_property
    def watched(self) -> dict[str, Any]:
        """What was seen in a run that was prepared and trained in one process; see `ptrain.testing.watch`.

        Raises:
            PluginError: it fails.
        """
        from ptrain.testing.watch import FILE, watch

        folder = self.folder / "watched"
        return self._made(folder, FILE, watch, self._placed(self.recipe, "watched"))

    @functools.cached_property
    def faults(self) -> dict[str, Any]:
        """What comes of it when the plugin's own code fails, by stage; see `ptrain.testing.faults`.

        Raises:
            PluginError: a run fails for another reason.
        """
        from ptrain.testing.faults import FILE, faults

        return self._made(self.folder / "faults", FILE, faults, self.recipe)

    def _made(self, folder: Path, file: str, work: Callable[..., None], recipe: Mapping[str, Any]) -> dict[str, Any]:
        _ = self.reference  # as in `run`
        log = folder.with_name(f"{folder.name}.txt")
        try:
            run_workers(work, recipe, folder, self.kind, self.name, log=log)
        except WorkerFailed as error:
            raise self._failed(error) from None
        return json.loads((folder / file).read_text(encoding="utf-8"))

    @functools.cached_property
    def fresh(self) -> dict[str, list[str]]:
        """The modules that a new interpreter has: `found` after it has looked up what is installed, `loaded` after it
        has imported the plugin too.

        Raises:
            PluginError: it can't be imported.
        """
        code = (
            "import json, sys; from ptrain.catalog import Catalog; catalog = Catalog.installed();"
            "found = sorted(sys.modules); catalog.load(catalog.find(*sys.argv[1:]));"
            "print(json.dumps({'found': found, 'loaded': sorted(sys.modules)}))"
        )
        command = [sys.executable, "-c", code, self.kind, self.name]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise self.wrong(f"a new interpreter can't import it: {done.stderr.strip()}")
        return json.loads(done.stdout.splitlines()[-1])

    @property
    def whole(self) -> Finished:
        """The run that others are compared with: one worker, 4 rows at a time.

        Raises:
            PluginError: it fails.
        """
        return self.run(WHOLE)

    @property
    def reference(self) -> Finished:
        """The same, for checks that can say nothing where it fails.

        Raises:
            NotApplicable: it does; the check `trains` says how.
        """
        self.ready()
        try:
            return self.whole
        except PtrainError:
            raise NotApplicable("the check `trains` fails") from None

    def ready(self) -> None:
        """Raise `NotApplicable` where the recipe is refused; the check `config` says why."""
        try:
            _ = self.loaded
        except PtrainError:
            raise NotApplicable("the check `config` fails") from None

    @property
    def resumed(self) -> Finished:
        """The same run, cut off and gone on with in another process."""
        self.run("resumed", exit_iteration=CUT)
        return self.run("resumed", resume=True)
