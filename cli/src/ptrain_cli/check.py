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
    from ptrain.launch.report import show
    from ptrain.plugin import Stack
    from ptrain.recipe.load import load_recipe
    from ptrain.recipe.machine import machine_problems
    from ptrain.run import layers_of

    loaded = load_recipe(recipe, override or [], code=code, allow_code=allow_code)
    Stack(layers_of(loaded))  # refuses hooks, arguments and callbacks that can't be
    for problem in [*loaded.warnings, *machine_problems(loaded)]:
        show("warning", str(problem))
    typer.echo(f"ok: {recipe} ({loaded.recipe.type})")
    return 0
