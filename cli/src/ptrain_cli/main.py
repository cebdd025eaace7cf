"""The program `ptrain`. Nothing heavy is imported before a command needs it: help must be there at once."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ptrain_cli import check, completion, data, explain, export, plan, plugins, prepare, run, schema
from ptrain_cli.commands import Commands
from ptrain_cli.options import Debug

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain check recipe.yaml

[dim]$[/dim] ptrain run recipe.yaml

[dim]$[/dim] ptrain run --help
"""

app = typer.Typer(
    name="ptrain",
    cls=Commands,
    help="Post-training of language models from one declarative recipe.",
    epilog=EXAMPLES,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", epilog=run.EXAMPLES)(run.command)
app.command("check", epilog=check.EXAMPLES)(check.command)
app.command("explain", epilog=explain.EXAMPLES)(explain.command)
app.command("plan", epilog=plan.EXAMPLES)(plan.command)
app.command("prepare", epilog=prepare.EXAMPLES)(prepare.command)
app.command("export", epilog=export.EXAMPLES)(export.command)
app.command("schema", epilog=schema.EXAMPLES)(schema.command)
app.add_typer(data.app, name="data")
app.add_typer(plugins.app, name="plugins")


def _version(wanted: bool) -> None:
    if wanted:
        from ptrain_cli.version import describe

        typer.echo(describe())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Options of the program itself; each acts by its callback."""


def main() -> None:
    """Run the command line; the process ends with its exit code."""
    completion.patch_script()
    if os.environ.get("NO_COLOR"):
        # Rich leaves out colours alone; bold and dim are codes too.
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    try:
        code = app(prog_name="ptrain", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        from ptrain_cli.errors import report

        code = report(error)
    sys.exit(code)


if __name__ == "__main__":
    main()
