"""`ptrain explain`: what a run would be made of."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ptrain_cli.options import AllowCode, Code, Debug, Overrides, Recipe
from ptrain_cli.table import aligned

if TYPE_CHECKING:
    from ptrain.account import Act, Setting

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain explain recipe.yaml

[dim]$[/dim] ptrain explain recipe.yaml -o optimizer.lr=2e-5 --code train.py

[dim]$[/dim] ptrain explain recipe.yaml --json | jq .settings
"""


def command(
    recipe: Recipe,
    override: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    code: Code = None,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> int:
    """Show who acts at each stage, in which order, and where the value of each key comes from. Runs nothing."""
    from dataclasses import asdict

    from ptrain import account
    from ptrain.directory import run_directory
    from ptrain.recipe.load import load_recipe
    from ptrain.run import Run

    loaded = load_recipe(recipe, override or [], code=code, allow_code=allow_code)
    run = Run(loaded, run_directory(loaded.recipe, recipe))
    acts, settings = account.acts(run.stack), account.settings(run)
    if as_json:
        stages = {
            stage: {"kind": account.kind(stage), "acts": [asdict(a) for a in found]} for stage, found in acts.items()
        }
        typer.echo(json.dumps({"stages": stages, "settings": [asdict(one) for one in settings]}, indent=1, default=str))
        return 0
    typer.echo("Stages, each with what acts there, in the order in which it begins:\n")
    typer.echo("\n".join(_stage(stage, account.kind(stage), found) for stage, found in acts.items()))
    typer.echo("\nSettings:\n")
    typer.echo(aligned([_row(one) for one in settings]))
    return 0


def _stage(stage: str, kind: str, acts: list[Act]) -> str:
    if not acts:
        return f"{stage} ({kind}): nobody"
    rows = [("", act.role, act.layer, act.origin, act.where) for act in acts]
    return f"{stage} ({kind})\n{aligned(rows)}"


def _row(one: Setting) -> tuple[str, ...]:
    value = json.dumps(one.value, ensure_ascii=False, default=str)
    source = f"{one.origin}: {one.source}" if one.source else one.origin
    variables = f" (environment: {', '.join(one.environment)})" if one.environment else ""
    return one.key, value if len(value) <= 60 else f"{value[:57]}...", source + variables
