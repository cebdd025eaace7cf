"""`ptrain schema`: the JSON schema of recipes."""

from __future__ import annotations

import typer

from ptrain_cli.options import Debug

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain schema > ptrain.schema.json

For completion in editors with a YAML language server, begin a recipe with

[dim]#[/dim] yaml-language-server: $schema=ptrain.schema.json
"""


def command(debug: Debug = False) -> int:
    """Print the JSON schema of recipes, with the sections of all installed plugins."""
    import json

    from ptrain.catalog import Catalog
    from ptrain.recipe.schema import schema

    typer.echo(json.dumps(schema(Catalog.installed()), indent=2))
    return 0
