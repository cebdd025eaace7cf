"""A recipe, prepared in this process and trained by real workers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptrain.testing.finished import Finished
from ptrain.testing.recipes import merged


def prepare(recipe: Mapping[str, Any], folder: Path, *, workers: int = 1, resume: bool = False,
            code: Path | None = None) -> Path:  # fmt: skip
    """Prepare a run in `folder`, in this process; return the file that workers start from.

    Raises:
        PtrainError: what a real run would show.
    """
    from ptrain.job import prepare_run
    from ptrain.recipe.load import load_recipe

    loaded = load_recipe(merged(recipe, {"output_dir": str(folder)}), code=code, allow_code=True)
    return prepare_run(loaded, None, resume=resume, workers=workers)


def run(recipe: Mapping[str, Any], folder: Path, *, workers: int = 1, resume: bool = False,
        code: Path | None = None) -> Finished:  # fmt: skip
    """Prepare a run in `folder` and train it in so many processes; return what it has left.

    Raises:
        PtrainError: what a real run would show in its preparation.
        WorkerFailed: a worker did; with what it wrote.
    """
    from ptrain.directory import release
    from ptrain.testing.jobs import train
    from ptrain.testing.workers import run_workers

    with contextlib.redirect_stdout(io.StringIO()) as said:
        spec = prepare(recipe, folder, workers=workers, resume=resume, code=code)
    try:
        output = run_workers(train, spec, log=folder / "output.txt", workers=workers)
    finally:
        release(spec.parent)
    return Finished(folder, said.getvalue() + output)


def prepare_rows(recipe: Mapping[str, Any], folder: Path) -> None:
    """Prepare the data of a recipe alone.

    Raises:
        PtrainError: it can't be.
    """
    from ptrain.job import prepare_data
    from ptrain.recipe.load import load_recipe

    prepare_data(load_recipe(recipe), folder)
