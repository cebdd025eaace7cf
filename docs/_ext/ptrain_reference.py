"""Writes the reference pages from the code: hooks, recipe keys and the command line.

A page says where with a comment, `<!-- generated: hooks -->`; what stands there instead is Markdown. Nothing
here imports torch.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

import typer.main
from pydantic.fields import FieldInfo
from rich.text import Text
from sphinx.application import Sphinx

from ptrain import hooks, parts
from ptrain.recipe import elsewhere, sections
from ptrain.recipe.config import Config
from ptrain.recipe.describe import describe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SECTIONS = {"logger": sections.LoggerConfig, "wandb": sections.WandbConfig}
PLACES = {
    "model": "model",
    "tokenizer": "tokenizer",
    "source": "data.sources",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "checkpoint": "checkpoint",
    "evaluator": "evaluation",
    "tracker": "trackers",
    "plugin": "plugins",
}
"""Where in a recipe a part of each kind is chosen."""


def stages() -> dict[str, Callable[..., Any]]:
    """Every hook by name, in run order."""
    return {name: f for name, f in vars(hooks).items() if hasattr(f, "ptrain_spec")}


def signature(name: str, function: Callable[..., Any]) -> str:
    """`name(run: Run, ...) -> Result`, as it stands in `ptrain.hooks`."""
    return name + str(inspect.signature(function)).replace("'", "")


def generated_hooks() -> Iterator[str]:
    """A section for each hook."""
    for name, function in stages().items():
        yield f"## {name}"
        yield f"```python\n{signature(name, function)}\n```"
        text = inspect.cleandoc(function.__doc__ or "")
        yield re.sub(r"\n+(When|Default|Raises|Kind): ", r"\n\n**\1:** ", text)


def generated_recipe() -> Iterator[str]:
    """The top-level keys, the sections of core, and every part that the distributions here offer."""
    yield "## Top level"
    yield table(sections.CoreConfig)
    for name, trainer in installed("trainer"):
        if trainer.Config.model_fields:
            yield f"### Top level of `type: {name}`"
            yield table(trainer.Config)
        for key, config in nested(trainer.Config):
            yield f"### {key} of `type: {name}`"
            yield table(config)
    for name, config in SECTIONS.items():
        yield f"## {name}"
        yield table(config)
    yield "## data"
    yield table(sections.DataConfig)
    for name, trainer in installed("trainer"):
        yield f"### data of `type: {name}`"
        yield table(trainer.Data, beyond=sections.DataConfig)
    for kind, place in PLACES.items():
        yield from generated_kind(kind, place)
    yield "## Defaults of each trainer"
    yield "Where a section gives no `type`, the trainer's own default is taken."
    yield from (defaults(name, trainer) for name, trainer in installed("trainer"))


def defaults(name: str, trainer: Any) -> str:
    """Which parts a trainer takes where the recipe names none."""
    rows = [f"- `{PLACES[kind]}`: `{part}`" for kind, part in trainer.parts.items()]
    return "\n".join([f"`type: {name}`", "", *rows])


def generated_kind(kind: str, place: str) -> Iterator[str]:
    """The section that chooses a part of this kind: the common keys, then those of each part."""
    common = parts.KINDS[kind].Config
    yield f"## {place}"
    yield table(common)
    for name, part in installed(kind):
        yield f"### {place}: `type: {name}`"
        yield inspect.cleandoc(part.__doc__ or "")
        yield table(part.Config, beyond=common)


def installed(kind: str) -> list[tuple[str, Any]]:
    """Name and class of every part of `kind`, sorted by name."""
    return sorted((point.name, point.load()) for point in entry_points(group=f"ptrain.{kind}"))


def table(config: type[Config], beyond: type[Config] | None = None) -> str:
    """The keys of `config` as a table; without those that it shares with `beyond`."""
    known = beyond.model_fields if beyond else {}
    fields = {n: f for n, f in config.model_fields.items() if n not in known or same(f, known[n])}
    if not fields:
        return "No keys of its own."
    rows = [
        f"| `{name}` | {cell(describe(field))} | {default_of(field)} | {cell(field.description or '')} |"
        for name, field in fields.items()
    ]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])


def nested(config: type[Config]) -> Iterator[tuple[str, type[Config]]]:
    """The keys that hold a section of their own, and what that may have."""
    for name, field in config.model_fields.items():
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, Config):
                yield name, option


def same(field: FieldInfo, other: FieldInfo) -> bool:
    """Whether a key that a class has inherited says something new."""
    return (field.default, field.description) != (other.default, other.description)


def default_of(field: FieldInfo) -> str:
    """The default, as it would be written."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        value = list(value)
    return "" if isinstance(value, Config) else f"`{value}`"


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def generated_cli() -> Iterator[str]:
    """A section for each command, from the parsers themselves."""
    from ptrain_cli.main import app

    yield from generated_command("ptrain", typer.main.get_command(app))


def generated_benchmarks() -> Iterator[str]:
    """A section for each recorded benchmark: what was measured with what, and every ratio."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        hardware, versions = result["hardware"], result["versions"]
        yield f"## {path.stem}"
        yield (
            f"{result['date']}, {hardware['gpu'] or 'no GPU'}, {hardware['cores']} cores of {hardware['processor']}, "
            + ", ".join(f"{package} {version}" for package, version in versions.items())
            + f"; {result['rounds']} rounds, {result['threads']} OpenMP thread. `python benchmarks/{path.stem}.py`"
        )
        rows = [
            f"| {name} | {values['median']:.2f} | {values['lowest']:.2f} to {values['highest']:.2f} |"
            for name, values in result["ratios"].items()
        ]
        yield "\n".join(["| ratio | median | rounds |", "|---|---|---|", *rows])
        numbers = [
            f"| {case} | " + ", ".join(f"{value:,.4g} {unit}" for unit, value in values.items()) + " |"
            for case, values in result["cases"].items()
        ]
        yield "\n".join(["| case | medians |", "|---|---|", *numbers])


def generated_command(name: str, command: Any) -> Iterator[str]:
    """The section of one command, then those of its sub-commands."""
    usage = " ".join(command.collect_usage_pieces(typer.Context(command, info_name=name)))
    yield f"## {name}"
    yield plain(command.help)
    yield f"```text\n{name} {usage.replace('{', '').replace('}', '')}\n```"
    yield flags(command)
    yield f"```text\n{plain(command.epilog)}\n```" if command.epilog else ""
    for sub, one in getattr(command, "commands", {}).items():
        if not one.hidden:
            yield from generated_command(f"{name} {sub}", one)


def flags(command: Any) -> str:
    """The arguments and flags of a command as a table."""
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    rows = [f"| {names(p)} | {cell(plain(p.help))} |" for p in shown]
    return "\n".join(["| argument | meaning |", "|---|---|", *rows]) if rows else ""


def names(parameter: Any) -> str:
    """How an argument or flag is written."""
    written = [*parameter.opts, *parameter.secondary_opts]
    return ", ".join(f"`{one if one.startswith('-') else one.upper()}`" for one in written)


def plain(text: str | None) -> str:
    """Help without the marks for a terminal."""
    return Text.from_markup(inspect.cleandoc(text or "")).plain


def generated_elsewhere() -> Iterator[str]:
    """What became of the keys and names that nothing installed here owns."""
    for kind, names in elsewhere.PARTS.items():
        here = {name for name, _ in installed(kind)}
        place = "" if kind == "trainer" else PLACES.get(kind, kind)
        yield from moved(f"`type` {where(place)}", {n: e for n, e in names.items() if n not in here})
    for section, keys in elsewhere.KEYS.items():
        yield from moved(f"Keys {where(PLACES.get(section, section))}", keys)


def where(place: str) -> str:
    """In which section, as a phrase."""
    return f"in `{place}`" if place else "at the top level"


def moved(title: str, names: Mapping[str, elsewhere.Elsewhere]) -> Iterator[str]:
    """A table of names, each reason once."""
    together: dict[elsewhere.Elsewhere, list[str]] = {}
    for name, entry in names.items():
        together.setdefault(entry, []).append(f"`{name}`")
    rows = [f"| {', '.join(n)} | {cell(w.reason)} | {cell(w.fix)} |" for w, n in together.items()]
    yield f"### {title}"
    yield "\n".join(["| name | why | instead |", "|---|---|---|", *rows])


GENERATORS = {
    "benchmarks": generated_benchmarks,
    "cli": generated_cli,
    "elsewhere": generated_elsewhere,
    "hooks": generated_hooks,
    "recipe": generated_recipe,
}


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the comments of a page by what they stand for."""

    def made(match: re.Match[str]) -> str:
        return "\n\n".join(GENERATORS[match[1]]())

    source[0] = re.sub(r"<!-- generated: (\w+) -->", made, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True}
