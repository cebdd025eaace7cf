"""The list of commands: ptrain's own, and those of installed packages (entry points `ptrain.command`)."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

GROUP = "ptrain.command"


class Commands(TyperGroup):
    """A group whose further commands come from installed packages, each imported when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands: ptrain's own in their order, then the others."""
        own = super().list_commands(ctx)
        return [*own, *sorted(name for name in _offered() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; for one of another package what the list of commands needs of it."""
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in _offered():
            return own
        return TyperCommand(cmd_name, help=f"A command of the package {_offered()[cmd_name]}.")

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called, imported if it is that of another package.

        Raises:
            PluginError: it can't be imported, or two packages offer it.
        """
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and super().get_command(ctx, name) is None:
            command = _load(name)
        return name, command, rest


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
