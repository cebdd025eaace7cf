"""`ptrain export`: the model of a run, for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptrain_cli.options import Code, Debug

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain export runs/recipe --merge

[dim]$[/dim] ptrain export runs/recipe/2026-01-31T12-00-00Z --to my-model
"""


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", show_default=False,
                                        help="The directory of a run, or of all runs of a recipe: then the newest.")],
    merge: Annotated[bool, typer.Option("--merge", help="Put the adapter into the weights of its model.")] = False,
    to: Annotated[Path | None, typer.Option(metavar="FOLDER", show_default=False,
                                            help="The folder to make. [default: in the run directory]")] = None,
    code: Code = None,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Write the model of a run's newest checkpoint as others load it, or merge its adapter."""
    from ptrain.export import export
    from ptrain.launch.report import show_warnings

    show_warnings()
    typer.echo(f"model: {export(run, to, merge=merge, code=code)}")
    return 0
