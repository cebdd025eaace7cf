"""`ptrain data`: look at what is trained on."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptrain_cli.options import AllowCode, Code, Debug, Overrides, Recipe
from ptrain_cli.prepare import prepared_data

if TYPE_CHECKING:
    from ptrain.data.audit import Audit
    from ptrain.data.show import Sample

SHOW = """[bold]Examples[/bold]

[dim]$[/dim] ptrain data show recipe.yaml

[dim]$[/dim] ptrain data show recipe.yaml --from 100 --count 1 --split eval

[dim]$[/dim] ptrain data show recipe.yaml --plain | less
"""
AUDIT = """[bold]Examples[/bold]

[dim]$[/dim] ptrain data audit recipe.yaml

[dim]$[/dim] ptrain data audit recipe.yaml --json | jq '.splits.train[0].unsupervised'
"""
OPEN, CLOSE = "\u27ea", "\u27eb"
"""Round what is learnt, where there is no colour."""
SAYS = {
    "broken": "can't be read",
    "unrenderable": "refused by the chat template",
    "unsupervised": "without a token to learn",
    "overlong": "longer than data.max_length",
    "several_bos": "with more than one BOS",
    "duplicates": "the same as an earlier one",
    "empty_turns": "with an empty assistant turn",
}

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain data show recipe.yaml

[dim]$[/dim] ptrain data audit recipe.yaml
"""

app = typer.Typer(
    help="Look at what is trained on: samples as they are, and all that is wrong.",
    epilog=EXAMPLES,
    no_args_is_help=True,
)


class Split(str, Enum):
    """Which rows."""

    train = "train"
    eval = "eval"


@app.command("show", epilog=SHOW)
def show(
    recipe: Recipe,
    override: Overrides = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many samples.")] = 3,
    first: Annotated[int, typer.Option("--from", min=1, help="The number of the first one.")] = 1,
    split: Annotated[Split, typer.Option(help="Training or evaluation samples.")] = Split.train,
    plain: Annotated[
        bool, typer.Option("--plain", help=f"Mark what is learnt by {OPEN} {CLOSE} instead of green.")
    ] = False,
    code: Code = None,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> int:
    """Print prepared samples, token by token as they are trained on, with what is learnt in green."""
    from ptrain.garbage import look_seldom

    look_seldom()
    import sys

    from ptrain.data.show import samples

    prepared = prepared_data(recipe, override, code, allow_code)
    coloured = not plain and sys.stdout.isatty()
    typer.echo(f"what is learnt is {'green' if coloured else f'between {OPEN} and {CLOSE}'}")
    shown = 0
    for sample in samples(prepared, split.value, range(first, first + count)):
        typer.echo(_sample(sample, coloured))
        shown += 1
    if not shown:
        total = len(getattr(prepared, split.value))
        raise typer.BadParameter(f"there are {total:,} samples for {split.value}", param_hint="--from")
    return 0


def _sample(sample: Sample, coloured: bool) -> str:
    learnt = f", {sample.supervised:,} of them learnt" if sample.supervised else ""
    lines = [f"\n--- sample {sample.number}: {sample.tokens:,} tokens{learnt}"]
    for number, parts in enumerate(sample.documents, 1):
        if len(sample.documents) > 1:
            lines.append(f"--- document {number}")
        lines.append("".join(_marked(text, coloured) if learnt else text for text, learnt in parts))
    return "\n".join(lines)


def _marked(text: str, coloured: bool) -> str:
    return typer.style(text, fg=typer.colors.GREEN) if coloured else f"{OPEN}{text}{CLOSE}"


@app.command("audit", epilog=AUDIT)
def audit_command(
    recipe: Recipe,
    override: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    code: Code = None,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> int:
    """Count everything that is wrong or odd in every source; exit code 2 where a run would stop on it."""
    from ptrain.garbage import look_seldom

    look_seldom()
    import json
    from dataclasses import asdict

    from ptrain.data.audit import audit, stops
    from ptrain.directory import run_directory
    from ptrain.recipe.load import load_recipe
    from ptrain.run import Run

    loaded = load_recipe(recipe, override or [], code=code, allow_code=allow_code)
    run = Run(loaded, run_directory(loaded.recipe, recipe))
    found = audit(run)
    reasons = stops(run, found)
    if as_json:
        splits: dict[str, Any] = {split: [asdict(one) for one in audits] for split, audits in found.items()}
        typer.echo(json.dumps({"splits": splits, "stops": reasons}, indent=1, ensure_ascii=False))
    else:
        lines = [line for split, audits in found.items() for one in audits for line in _lines(split, one)]
        lines += [f"a run would stop: {reason}" for reason in reasons] or ["a run would not stop on this data"]
        typer.echo("\n".join(lines))
    return 2 if reasons else 0


def _lines(split: str, one: Audit) -> list[str]:
    lines = [f"{split}: {one.source}: {one.rows:,} rows"]
    if one.tokens:  # none of rows that only their trainer understands
        lines[0] += f", {one.tokens:,} tokens, {one.supervised_tokens / one.tokens:.1%} learnt"
    if one.turns:
        ended = 1 - one.unended_turns / one.turns
        lines.append(f"  {one.turns:,} assistant turns, {ended:.1%} of them with an end-of-turn token that is learnt")
    if one.lengths:
        lines.append("  lengths: " + ", ".join(f"{name} {value:,}" for name, value in one.lengths.items()))
    for kind, says in SAYS.items():
        found = getattr(one, kind)
        if found.count:
            more = ", ..." if found.count > len(found.rows) else ""
            lines.append(f"  {found.count:,} {says}: {', '.join(found.rows)}{more}")
    return lines
