"""`ptrain plugins`: what is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptrain_cli.options import Debug

if TYPE_CHECKING:
    from ptrain.catalog import Catalog

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain plugins list

[dim]$[/dim] ptrain plugins list --json | jq '.[] | select(.status != "ok")'
"""

app = typer.Typer(help="Show what installed packages offer to recipes.", epilog=EXAMPLES, no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Makes `list` a command of its own although it is the only one."""


@app.command("list", epilog=EXAMPLES)
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: Debug = False,
) -> int:
    """List trainers, parts, features and commands: name, package, version, and whether each can be used."""
    import json

    from ptrain.catalog import Catalog

    rows = describe(Catalog.installed())
    typer.echo(json.dumps(rows, indent=2) if as_json else table(rows))
    return 0


def describe(catalog: Catalog) -> list[dict[str, Any]]:
    """One row for each thing on offer, by kind and name."""
    rows = []
    for offer in catalog.all:
        status = catalog.status(offer)
        rows.append(
            {
                "kind": offer.kind,
                "name": offer.name,
                "distribution": offer.distribution,
                "version": offer.version,
                "status": status.state,
                "reason": status.reason,
                "provides": offer.value,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person: aligned columns, and below them why something can't be used."""
    columns = ("kind", "name", "distribution", "version", "status", "provides")
    lines = [columns, *(tuple(str(row[column]) for column in columns) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    reasons = [f"{row['kind']} {row['name']}: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join([*text, *(["", *reasons] if reasons else [])])
