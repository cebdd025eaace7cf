"""`ptrain plugins`: what is installed, and whether it keeps what plugins promise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptrain_cli import new
from ptrain_cli.completion import plugin_names, recipes
from ptrain_cli.options import Debug, Overrides

if TYPE_CHECKING:
    from ptrain.catalog import Catalog, Offer
    from ptrain.testing.checks import Check, Outcome

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain plugins list

[dim]$[/dim] ptrain plugins list --json | jq '.[] | select(.status != "ok")'
"""

SHOW = """[bold]Examples[/bold]

[dim]$[/dim] ptrain plugins show sft

[dim]$[/dim] ptrain plugins show ptrain-dpo --json
"""

CHECK = """[bold]Examples[/bold]

[dim]$[/dim] ptrain plugins check sft

[dim]$[/dim] ptrain plugins check ptrain-dpo

[dim]$[/dim] ptrain plugins check wsd -o scheduler.num_warmup_steps=1 -o scheduler.num_decay_steps=2
"""
Name = Annotated[
    str,
    typer.Argument(metavar="NAME", show_default=False, autocompletion=plugin_names,
                   help="What a recipe calls it, or a package."),
]  # fmt: skip

app = typer.Typer(
    help="Show and check what installed packages offer to recipes, and begin a package of your own.",
    epilog=EXAMPLES,
    no_args_is_help=True,
)
app.command("new", epilog=new.EXAMPLES)(new.command)


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


@app.command("show", epilog=SHOW)
def show(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> int:
    """Show what a package offers: what it does at which stage, and the keys that it takes."""
    import json

    from ptrain.catalog import Catalog
    from ptrain.portrait import portraits

    found = portraits(Catalog.installed(), name)
    typer.echo(json.dumps(found, indent=2) if as_json else "\n\n".join(map(_portrait, found)))
    return 1 if any(one["error"] for one in found) else 0


@app.command("check", epilog=CHECK)
def check(
    name: Name,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", autocompletion=recipes,
                                                help="Keys that the tiny recipe of the checks needs besides.")] = None,
    override: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Check what is promised of plugins, with real runs of a tiny recipe on CPU; exit code 1 if a check fails."""
    import json

    from ptrain.catalog import Catalog
    from ptrain.testing.checking import check_all, subjects

    offers = subjects(Catalog.installed(), name)
    changes = _keys(recipe, override or [])
    found = []
    for offer, one, outcome in check_all(offers, changes):
        _show_check(offer, one, outcome, first=one.name == "hooks", err=as_json)
        if outcome is not None:
            found.append(_row(offer, outcome))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    return 1 if any(row["state"] == "failed" for row in found) else 0


def _keys(recipe: Path | None, override: list[str]) -> dict[str, Any]:
    """The keys of a file, with overrides."""
    from ptrain.recipe import overrides, tree
    from ptrain.recipe.document import Document

    document = tree.read_file(recipe) if recipe is not None else Document({})
    overrides.apply(document, override)
    return document.data


def _show_check(offer: Offer, check: Check, outcome: Outcome | None, *, first: bool, err: bool) -> None:
    """A line that begins when the check begins, and ends with what came of it."""
    if outcome is None:
        if first:
            typer.echo(f"{offer.kind} {offer.name} ({offer.distribution} {offer.version})", err=err)
        typer.echo(f"  {check.name:12}", nl=False, err=err)
    else:
        reason = outcome.reason.replace("\n", "\n    ")
        typer.echo(f" {outcome.state}" + (f": {reason}" if reason else ""), err=err)


def _row(offer: Offer, outcome: Outcome) -> dict[str, Any]:
    return {
        "kind": offer.kind, "name": offer.name, "distribution": offer.distribution, "version": offer.version,
        "check": outcome.check, "state": outcome.state, "reason": outcome.reason,
    }  # fmt: skip


def _portrait(one: dict[str, Any]) -> str:
    licence = f", {one['licence']}" if one["licence"] else ""
    wants = f", wants {one['wants']}" if one["wants"] else ""
    lines = [f"{one['kind']} {one['name']} ({one['distribution']} {one['version']}{licence}{wants})"]
    if one["error"]:
        return "\n".join([*lines, f"  can't be used: {one['error']}"])
    lines += [f"  {one['does']}", f"  {one['provides']}"]
    for title, told in (
        ("stages", ", ".join(f"{stage['stage']} ({stage['role']})" for stage in one["stages"])),
        ("callbacks", ", ".join(one["callbacks"])),
        ("parts", ", ".join(f"{kind}: {name}" for kind, name in one["parts"].items())),
    ):
        lines += [f"  {title}: {told}"] if told else []
    for title, keys in (("keys", one["keys"]), ("keys of `data`", one["data"])):
        lines += [f"  {title}:"] if keys else []
        lines += [f"    {key['key']}: {key['takes']} (default: {key['default']})\n      {key['does']}" for key in keys]
    return "\n".join(lines)


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
