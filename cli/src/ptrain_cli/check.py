"""`ptrain check`: validate a recipe."""

from __future__ import annotations

import typer

from ptrain_cli.options import AllowCode, Code, Debug, Overrides, Recipe

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain check recipe.yaml

[dim]$[/dim] ptrain check recipe.yaml -o model.name_or_path=my-model
"""


def command(
    recipe: Recipe,
    override: Overrides = None,
    code: Code = None,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> int:
    """Validate a recipe: exit code 0 if it is right, 2 if not. Needs no network and no GPU."""
    from ptrain.directory import run_directory
    from ptrain.launch.report import show
    from ptrain.recipe.load import load_recipe
    from ptrain.recipe.machine import machine_problems
    from ptrain.run import Run

    loaded = load_recipe(recipe, override or [], code=code, allow_code=allow_code)
    Run(loaded, run_directory(loaded.recipe, recipe))  # refuses what hooks can't be, and what `configure` does
    for problem in [*loaded.warnings, *machine_problems(loaded)]:
        show("warning", str(problem))
    typer.echo(f"ok: {recipe} ({loaded.recipe.type})")
    return 0
