"""`ptrain prepare`: prepare the data alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ptrain_cli.options import AllowCode, Code, Debug, Overrides, Recipe

if TYPE_CHECKING:
    from ptrain.data.cache import Prepared

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain prepare recipe.yaml

[dim]$[/dim] ptrain prepare recipe.yaml -o data.cache_dir=/shared/cache -o data.num_proc=16
"""


def command(
    recipe: Recipe,
    override: Overrides = None,
    code: Code = None,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> int:
    """Load, tokenise and pack the data of a recipe into the cache, where `ptrain run` finds it."""
    from ptrain.garbage import look_seldom

    look_seldom()
    typer.echo(f"prepared: {prepared_data(recipe, override, code, allow_code).path}")
    return 0


def prepared_data(recipe: Path, override: list[str] | None, code: Path | None, allow_code: bool) -> Prepared:
    """The prepared data of a recipe, from the cache or made now; its counts are printed."""
    from ptrain.directory import run_directory
    from ptrain.job import prepare_data
    from ptrain.launch.report import show_warnings
    from ptrain.recipe.load import load_recipe

    show_warnings()
    loaded = load_recipe(recipe, override or [], code=code, allow_code=allow_code)
    return prepare_data(loaded, run_directory(loaded.recipe, recipe))[1]
