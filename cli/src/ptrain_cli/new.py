"""`ptrain plugins new`: begin a package with a plugin of one's own."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ptrain_cli.options import Debug

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain plugins new my-trainer

[dim]$[/dim] ptrain plugins new my-rows --kind source --to ~/code/my-rows
"""


class Kind(str, Enum):
    """What a new package can hold."""

    trainer = "trainer"
    source = "source"
    feature = "feature"
    checkpoint = "checkpoint"


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False,
                                        help="What a recipe will call it, e.g. `my-trainer`.")],
    kind: Annotated[Kind, typer.Option(help="What it is.")] = Kind.trainer,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write it; by default `ptrain-NAME`.")
    ] = None,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Write a package with one plugin to begin from: code, tests, a recipe, documentation, ready to install."""
    from ptrain_cli.scaffold import new_plugin

    names, folder = new_plugin(name, kind.value, to)
    typer.echo(f"{folder}: the {kind.value} `{names.name}`, in {folder / 'src' / names.module / 'plugin.py'}")
    typer.echo("\nInstall it, test it, use it:\n")
    for line in (f"cd {shlex.quote(str(folder))}", "pip install -e '.[test]'", "pytest", "ptrain run recipe.yaml"):
        typer.echo(f"  {line}")
    return 0
