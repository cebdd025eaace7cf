"""`ptrain prepare`: prepare the data alone."""

from __future__ import annotations

import typer

from ptrain_cli.options import AllowCode, Code, Debug, Overrides, Recipe

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
    from ptrain.recipe.load import load_recipe
    from ptrain.train import prepare_data, run_directory

    loaded = load_recipe(recipe, override or [], code=code, allow_code=allow_code)
    _run, prepared = prepare_data(loaded, run_directory(loaded.recipe, recipe).absolute())
    typer.echo(f"prepared: {prepared.path}")
    return 0
