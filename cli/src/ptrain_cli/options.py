"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ptrain_cli import completion


class Settings:
    """What the options of the program set for all commands.

    Attributes:
        debug: show tracebacks.
    """

    debug = False


def _set_debug(wanted: bool) -> None:
    Settings.debug = Settings.debug or wanted


Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
Recipe = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="The recipe, a YAML file.", show_default=False, autocompletion=completion.recipes
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override", "-o", metavar="KEY=VALUE", autocompletion=completion.override_keys,
        help="Set a key of the recipe, e.g. [bold]-o optimizer.lr=2e-5[/bold]; may be given again.",
    ),
]  # fmt: skip
Code = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Python code of your own that is the top layer of plugins.",
        autocompletion=completion.code_files,
    ),
]  # fmt: skip
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run the file that `code:` in the recipe names.")]
