"""`ptrain plan`: what a run will need, before it runs."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptrain_cli.completion import devices
from ptrain_cli.options import AllowCode, Code, Debug, Overrides, Recipe
from ptrain_cli.table import aligned

if TYPE_CHECKING:
    from ptrain.plan.devices import Device
    from ptrain.plan.disk import Saved
    from ptrain.plan.forecast import Forecast
    from ptrain.plan.memory import Memory

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain plan recipe.yaml

[dim]$[/dim] ptrain plan recipe.yaml --workers 8 --device h100-80gb

[dim]$[/dim] ptrain plan recipe.yaml --json | jq .memory
"""
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "update")
SAYS = {
    "optimizer": "its state, and the fp32 weights that it keeps",
    "buffers": "of DeepSpeed, in the backward pass",
    "update": "in the optimizer step, without activations",
}
UNITS = (("GiB", 2**30), ("MiB", 2**20))
WIDEST = 100


def command(
    recipe: Recipe,
    override: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-n", metavar="N", min=1,
            help="Workers of the whole run; by default as many as `ptrain run` takes here.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", autocompletion=devices,
            help="What each worker runs on, e.g. `h100-80gb` or `cpu`; by default what is here.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
    code: Code = None,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Tell what a run will need: steps, rates, memory, disk. Prepares data that is here; downloads nothing."""
    from ptrain.garbage import look_seldom

    look_seldom()
    from ptrain.directory import run_directory
    from ptrain.launch.plan import Arguments, make_plan
    from ptrain.launch.report import show, show_warnings
    from ptrain.plan.devices import find
    from ptrain.plan.forecast import forecast
    from ptrain.recipe.load import load_recipe

    show_warnings()
    loaded = load_recipe(recipe, override or [], code=code, allow_code=allow_code)
    found = find(device)
    made = forecast(loaded, run_directory(loaded.recipe, recipe), workers or make_plan(Arguments()).world, found)
    if as_json:
        typer.echo(json.dumps(_plain(made), indent=1))
        return 0
    for warning in made.warnings:
        show("warning", warning)
    typer.echo("\n\n".join(_sections(made)))
    return 0


def _sections(made: Forecast) -> Iterator[str]:
    yield _head(made)
    for title, lines in (
        ("steps", _steps(made)), ("data", _data(made)), ("memory of each worker", _memory(made)),
        ("with another choice", _others(made)), ("checkpoints", _checkpoints(made)), ("not known", made.unknown),
    ):  # fmt: skip
        shown = [_wrapped(line) for line in lines]
        if shown:
            yield "\n".join([title, *shown])


def _wrapped(line: str) -> str:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    return textwrap.fill(
        line, width, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _head(made: Forecast) -> str:
    steps = f"{made.steps.last:,} optimizer steps" if made.steps else "optimizer steps not known"
    workers = f"{made.workers} worker{'s' if made.workers > 1 else ''}"
    if made.memory is None:
        return f"{made.trainer} on {workers} ({made.device.name}): {steps}; memory not known"
    needs = "each needs" if made.workers > 1 else "needs"
    size = f"{_size(made.memory.peak)} of {_size(made.device.bytes)} ({made.device.name})"
    verdict = _verdict(made.memory, made.device, made.workers)
    return f"{made.trainer} on {workers}: {steps}; {needs} {size}: {verdict}"


def _verdict(memory: Memory, device: Device, workers: int) -> str:
    from ptrain.plan.memory import ROOM

    share = memory.share(device, workers)
    if share > 1:
        return "does not fit"
    fits = "fits" if share <= ROOM else "may not fit, too little is left"
    return fits if memory.activations is not None else f"{fits} without activations, which are not known"


def _steps(made: Forecast) -> Iterator[str]:
    found = made.steps
    if found is None:
        return
    line = f"{found.total:,} optimizer steps of {found.samples:,} sample{'' if found.samples == 1 else 's'}"
    if found.per_epoch:
        epochs = f"{found.total / found.per_epoch:.4g}"
        line += f", {found.per_epoch:,} an epoch: {epochs} epoch{'' if epochs == '1' else 's'}"
    yield line
    if found.last < found.total:
        yield f"stops after step {found.last:,}"
    if found.rates:
        by_step = {one.step: one.rate for one in found.rates}  # of few steps, some lie at several shares
        yield "learning rate: " + ", ".join(f"{rate:.3g} at step {step:,}" for step, rate in by_step.items())


def _data(made: Forecast) -> Iterator[str]:
    for split, rows in made.rows.items():
        share = f", {rows.supervised / rows.tokens:.1%} supervised" if rows.supervised else ""
        full = f" ({rows.fullness:.1%} full)" if rows.fullness is not None else ""
        counts = f"{rows.rows:,} rows, {rows.samples:,} samples{full}, {rows.tokens:,} tokens"
        yield f"{split}: {counts}{share}"
        if rows.dropped:
            yield f"{split}: " + ", ".join(f"{count:,} {reason}" for reason, count in rows.dropped.items())
    if made.padding is not None:
        yield f"padding: {made.padding:.1%} of what is computed"


def _memory(made: Forecast) -> Iterator[str]:
    memory, parameters = made.memory, made.parameters
    if memory is None or parameters is None:
        return
    trained = "all trained" if not parameters.frozen else f"{_number(parameters.trainable)} trained"
    yield (
        f"{_number(parameters.total)} parameters, {trained}; {memory.dtype}, ZeRO {memory.stage}, activations "
        f"{'computed again' if memory.recompute else 'kept'}; "
        f"micro-batches up to {memory.samples} x {memory.length:,} tokens{_shared(memory)}"
    )
    parts = [(name, value, SAYS.get(name, "")) for name in PARTS if (value := getattr(memory, name))]
    share = memory.share(made.device, made.workers)
    part = f"{share:.0%}" if share >= 0.01 else "under 1%"
    shared = f", shared by {made.workers} workers" if made.device.kind == "cpu" and made.workers > 1 else ""
    parts.append(("at most", memory.peak, f"at a time: {part} of {_size(made.device.bytes)}{shared}"))
    if memory.host:
        parts.append(("offloaded", memory.host, "in the memory of the machine"))
    rows = [(name, _size(value, memory.peak), says) for name, value, says in parts]
    yield from aligned(rows, numbers={1}).splitlines()
    if made.longest is not None:
        each = f", {memory.samples} at a time" if memory.samples > 1 else ""
        yield f"the longest rows that fit: {made.longest:,} tokens{each}" if made.longest else "no row fits"


def _shared(memory: Memory) -> str:
    """What a worker has of rows that it shares."""
    return f", {memory.columns:,} of each row on this worker" if memory.columns < memory.length else ""


def _others(made: Forecast) -> Iterator[str]:
    if made.others:
        largest = max(choice.memory.peak for choice in made.others)
        rows = [
            (
                choice.name,
                _size(choice.memory.peak, largest),
                _verdict(choice.memory, made.device, made.workers),
            )
            for choice in made.others
        ]
        yield from aligned(rows, numbers={1}).splitlines()


def _checkpoints(made: Forecast) -> Iterator[str]:
    for one in made.saved:
        yield f"{one.type}, {one.when}: {', '.join(_saving(one))}"


def _saving(one: Saved) -> Iterator[str]:
    if one.steps is not None and one.kept is not None:
        yield f"{_times(one.steps)}, {one.kept:,} kept" if one.kept < len(one.steps) else _times(one.steps)
    if one.bytes is None:
        yield "size not known"
    else:
        yield f"{_size(one.bytes)} each"
    if one.most:
        few = "" if one.most <= one.free else ", which is too little"
        yield f"{_size(one.most)} at most of {_size(one.free)} free{few}"


def _times(steps: Sequence[int]) -> str:
    """After which steps, the middle ones left out."""
    if not steps:
        return "never"
    shown = [f"{step:,}" for step in steps]
    if len(shown) == 1:
        return f"once, after step {shown[0]}"
    if len(shown) > 4:
        shown = [*shown[:2], "...", shown[-1]]
    return f"{len(steps):,} times, after steps {', '.join(shown)}"


def _number(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:,}"


def _size(count: int, like: int | None = None) -> str:
    """Bytes for people; where a table has one unit, that of `like`, with enough digits for what is much smaller."""
    least = 1 if like is None else 10
    unit, size = next((one for one in UNITS if (like or count) >= least * one[1]), UNITS[-1])
    return f"{count / size:,.1f} {unit}"


def _plain(made: Forecast) -> dict[str, Any]:
    """The plan as JSON: what it says to people, in bytes."""
    from dataclasses import asdict

    def memory(one: Memory) -> dict[str, Any]:
        verdict = _verdict(one, made.device, made.workers)
        return {**asdict(one), "peak": one.peak, "share": one.share(made.device, made.workers), "verdict": verdict}

    found, sizes = asdict(made), made.parameters
    found["parameters"] = {"total": sizes.total, "trained": sizes.trainable} if sizes else None
    found["memory"] = memory(made.memory) if made.memory else None
    found["others"] = [{"name": one.name, **memory(one.memory)} for one in made.others]
    return found
