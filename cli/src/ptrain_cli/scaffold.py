"""What `ptrain plugins new` writes: a package with one plugin, complete, to begin from.

The templates are package data of the command line, not of core: they are of use to this command alone, and that of a
trainer extends the one of ptrain-sft, which core does not know. They are Jinja, with `<< >>` and `<% %>` in place of
braces, which Python, TOML and GitHub's workflows use themselves.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ptrain.errors import PluginError

TEMPLATES = Path(__file__).parent / "templates"
ENDING = ".jinja"
MODULE = "MODULE"
"""A folder of the templates that gets the name of the package."""
PREFIX = "ptrain-"
LONGEST = 30
"""Characters of a name: lines of code that hold it stay within their length."""
GROUPS = {"feature": "plugin"}
"""The entry-point group of a kind, without `ptrain.`, where it has another name."""
ANOTHER, ELSEWHERE = "choose another name", "choose another folder: `--to FOLDER`"
VALUES = ("true", "false", "null")
"""Words that YAML takes for something else than text."""


@dataclass(frozen=True)
class Names:
    """What a plugin is called: in recipes, as a distribution, as a package to import, as a class."""

    name: str
    distribution: str
    module: str
    cls: str


def new_plugin(given: str, kind: str, folder: Path | None = None) -> tuple[Names, Path]:
    """Write the package of a plugin called `given` and return its names and where it is.

    It is written aside and then renamed, so that a failure leaves nothing behind.

    Args:
        kind: "trainer", "source", "feature" or "checkpoint".
        folder: where, by default a folder of its name in the current one. It must be absent or empty.

    Raises:
        PluginError: the name can't be used or is taken, or the folder is in use or can't be written.
    """
    names = names_of(given, kind)
    folder = folder or Path(names.distribution)
    refuse_folder(folder)
    files = render(names, kind)
    there = folder.is_dir()
    # Within a folder that is there: it may be the current one, or a disk of its own.
    aside = (folder if there else folder.absolute().parent) / f".{names.distribution}.{secrets.token_hex(4)}"
    try:
        for path, text in files.items():
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            (aside / path).write_text(text, encoding="utf-8")
        if there:
            for path in [*aside.iterdir()]:
                path.rename(folder / path.name)
        else:
            aside.rename(folder)
    except OSError as error:
        raise PluginError(f"`{folder}` can't be written: {error.strerror}", fix=ELSEWHERE) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return names, folder


def names_of(given: str, kind: str) -> Names:
    """The names of a new plugin, with one `ptrain-` in front of that of the distribution.

    Raises:
        PluginError: it is no name, or taken.
    """
    name = given.removeprefix(PREFIX)
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > LONGEST:
        plain = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", given).lower()).strip("-")
        good = re.fullmatch(r"[a-z][a-z0-9-]*", plain.removeprefix(PREFIX)) and len(plain) <= LONGEST
        raise PluginError(
            f"`{given}` can't be the name of a plugin",
            expected=f"up to {LONGEST} lower-case letters, digits and single hyphens, beginning with a letter",
            fix=f"write `{plain}`" if good else None,
        )
    if name in VALUES:
        raise PluginError(f"`{name}` can't be the name of a plugin: in a recipe it is a value", fix=ANOTHER)
    # With its kind at the end, a class is not called like something that its file imports (`Path`, `Field`).
    words = name.split("-") + ([] if name.endswith(kind) else [kind])
    names = Names(name, PREFIX + name, (PREFIX + name).replace("-", "_"), "".join(map(str.capitalize, words)))
    refuse_taken(names, kind)
    return names


def refuse_taken(names: Names, kind: str) -> None:
    """Raise PluginError where somebody else has one of the names: in recipes, among packages, or to import."""
    from ptrain.catalog import Catalog
    from ptrain.recipe.elsewhere import part_elsewhere

    for offer in Catalog.installed().offers(GROUPS.get(kind, kind)):
        if offer.name == names.name:
            raise PluginError(
                f"there is a {kind} `{names.name}` already: {offer.distribution} {offer.version} offers it",
                expected="a name that is free", fix=ANOTHER,
            )  # fmt: skip
    if advice := part_elsewhere(GROUPS.get(kind, kind), names.name):
        raise PluginError(f"the {kind} `{names.name}` is known already: {advice.reason}", fix=ANOTHER)
    try:
        version = importlib.metadata.version(names.distribution)
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec(names.module) is None:
            return
        raise PluginError(f"there is a package `{names.module}` already", fix=ANOTHER) from None
    raise PluginError(f"the package {names.distribution} {version} is there already", fix=ANOTHER)


def refuse_folder(folder: Path) -> None:
    """Raise PluginError where something would be overwritten, or `folder` has no parent."""
    try:
        used = folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
        if used:
            what = "is not empty" if folder.is_dir() else "is no folder"
            raise PluginError(f"`{folder}` {what}", expected="a new or an empty folder", fix=ELSEWHERE)
        if not folder.absolute().parent.is_dir():
            raise PluginError(f"there is no folder `{folder.absolute().parent}` to write `{folder.name}` to")
    except OSError as error:
        raise PluginError(f"`{folder}` can't be read: {error.strerror}") from error


def render(names: Names, kind: str) -> Mapping[Path, str]:
    """The files of a new package: path and text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True,
        variable_start_string="<<", variable_end_string=">>", block_start_string="<%", block_end_string="%>",
        comment_start_string="<#", comment_end_string="#>",
    )  # fmt: skip
    known = {
        **asdict(names), "kind": kind, "group": GROUPS.get(kind, kind),
        "core": _from("ptrain-core"), "sft": _from("ptrain-sft"), "cli": _from("ptrain"),
    }  # fmt: skip
    found = {}
    for home in ("shared", kind):
        for path in sorted((TEMPLATES / home).rglob("*" + ENDING)):
            inside = path.relative_to(TEMPLATES / home).as_posix().removesuffix(ENDING)
            template = environment.get_template(path.relative_to(TEMPLATES).as_posix())
            found[Path(inside.replace(MODULE, names.module))] = template.render(known)
    return found


def _from(distribution: str) -> str:
    """The requirement of what is installed, up to its next major release: `>=0.1.0,<1`."""
    version = importlib.metadata.version(distribution)
    return f">={version},<{int(version.partition('.')[0]) + 1}"
