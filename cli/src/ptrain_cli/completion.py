"""What the Tab key offers: recipes, code, plugins, devices, keys of overrides. It prints nothing and writes nothing."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ptrain.recipe.document import Document

NO_SPACE = "    [[ ${COMPREPLY[0]} == *[.=/] ]] && compopt -o nospace 2>/dev/null\n"
"""For bash, which puts a space behind what is completed: `optimizer.`, `optimizer.lr=` and folders are gone on with."""


def recipes(incomplete: str) -> list[str]:
    """Recipes and folders."""
    return list(_paths(incomplete, (".yaml", ".yml")))


def code_files(incomplete: str) -> list[str]:
    """Python files and folders."""
    return list(_paths(incomplete, (".py",)))


def override_keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """The keys of the recipe that the command names, or of every recipe where it names none that can be read."""
    if "=" in incomplete:
        return []
    # A plugin may print while it is imported, or fail in any way: the line that is typed must not show it.
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        from ptrain.catalog import Catalog
        from ptrain.recipe.keys import continuations, known_keys

        return continuations(incomplete, known_keys(_document(ctx), Catalog.installed()))
    return []


def plugin_names(incomplete: str) -> list[str]:
    """What installed packages offer, and the packages."""
    from ptrain.catalog import Catalog

    offers = Catalog.installed().all
    return sorted(
        name
        for name in {one.name for one in offers} | {one.distribution for one in offers}
        if name.startswith(incomplete)
    )


def devices(incomplete: str) -> list[str]:
    """What a plan can be made for."""
    from ptrain.plan.devices import CPU, NOMINAL

    return [name for name in (*sorted(NOMINAL), CPU) if name.startswith(incomplete)]


def _document(ctx: typer.Context) -> Document:
    """The recipe of the command, with the overrides that are already there; an empty one where it can't be read."""
    from ptrain.errors import RecipeError
    from ptrain.recipe import overrides, tree
    from ptrain.recipe.document import Document

    # Where the last word is an option without its value, arguments are not assigned yet.
    recipe = ctx.params.get("recipe") or next(iter(ctx.args), "")
    try:
        # A pipe would be waited for.
        document = tree.read_file(Path(recipe)) if recipe and Path(recipe).is_file() else Document({})
        overrides.apply(document, [one for one in ctx.params.get("override") or [] if "=" in one])
    except RecipeError:
        return Document({})
    return document


def _paths(incomplete: str, endings: tuple[str, ...]) -> Iterator[str]:
    """Folders and the files with these endings that `incomplete` may be the beginning of."""
    head = incomplete[: incomplete.rfind("/") + 1]
    with contextlib.suppress(OSError), os.scandir(Path(head or ".").expanduser()) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = f"{head}{entry.name}"
            hidden = entry.name.startswith(".") and not incomplete[len(head) :]
            if not path.startswith(incomplete) or hidden:
                continue
            if entry.is_dir():
                yield f"{path}/"
            elif entry.name.endswith(endings):
                yield path


def patch_script() -> None:
    """Called before typer writes its completion script for bash, which lacks `NO_SPACE`."""
    if any(word.endswith("-completion") for word in sys.argv[1:]):
        from typer import _completion_shared as shared

        # Not public: where it is no more, completion works with the space.
        scripts = getattr(shared, "_completion_scripts", {})
        if "bash" in scripts:
            scripts["bash"] = scripts["bash"].replace("    return 0\n", f"{NO_SPACE}    return 0\n")
