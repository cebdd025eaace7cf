"""The list of commands: ptrain's own, and those of installed packages (entry points `ptrain.command`)."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

GROUP = "ptrain.command"


class Commands(TyperGroup):
    """A group whose further commands come from installed packages, each imported when it is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.offered = {name: who for name, who in sorted(_offered().items()) if name not in self.commands}
        for name, who in self.offered.items():
            # What the list of commands and suggestions need of it.
            self.commands[name] = TyperCommand(name, help=f"A command of the package {who}.")

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called, imported if it is that of another package.

        Raises:
            PluginError: it can't be imported, or two packages offer it.
        """
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name in self.offered else command, rest


def _offered() -> dict[str, str]:
    """The distribution of each command that an installed package offers."""
    points = importlib.metadata.entry_points(group=GROUP)
    return {point.name: point.dist.metadata["Name"] if point.dist else "?" for point in points}


def _load(name: str) -> Any:
    from ptrain.catalog import Catalog

    catalog = Catalog.installed()
    found = catalog.load(catalog.find("command", name))
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer()
        found.command(name)(function)
    return typer.main.get_command(found)
