"""What is installed: the entry points of the groups `ptrain.<kind>`, read from metadata without an import."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from packaging.requirements import InvalidRequirement, Requirement

from ptrain.errors import PluginError
from ptrain.recipe.config import Config
from ptrain.recipe.suggest import closest

CORE = "ptrain-core"
GROUP = "ptrain."


@dataclass(frozen=True, order=True)
class Offer:
    """One thing that an installed distribution offers under a name.

    Attributes:
        kind: "trainer", "model", ...: the entry-point group without `ptrain.`.
        name: what a recipe writes as `type`.
        distribution: who offers it; for the user's own code the name of the file.
        version: of the distribution; for the user's own code the beginning of the file's hash.
        value: `module:attribute`.
    """

    kind: str
    name: str
    distribution: str
    version: str
    value: str

    def __str__(self) -> str:
        return f"`{self.name}` of {self.distribution} {self.version}"


@dataclass(frozen=True)
class Status:
    """Whether an offer can be used.

    Attributes:
        state: "ok", "broken" (it can't be loaded) or "conflict" (its bare name has several owners).
        reason: why not.
    """

    state: Literal["ok", "broken", "conflict"]
    reason: str = ""


@dataclass
class Catalog:
    """Everything on offer, by kind and name. Making one imports nothing.

    Attributes:
        all: every offer, sorted.
        classes: classes that are there without an import (the user's own code).
    """

    all: tuple[Offer, ...] = ()
    classes: Mapping[Offer, type] = field(default_factory=dict)

    @classmethod
    def installed(cls) -> Catalog:
        """The catalog of this Python environment."""
        found: dict[str, list[Offer]] = {}
        for distribution in importlib.metadata.distributions():
            # Nearly all distributions are told apart by this text alone; parsing each would cost much more.
            if f"[{GROUP}" in (distribution.read_text("entry_points.txt") or ""):
                name = distribution.metadata["Name"]
                # Of two copies of one distribution on the path, Python imports the first.
                found.setdefault(_normal(name), [
                    Offer(point.group.removeprefix(GROUP), point.name, name, distribution.version, point.value)
                    for point in distribution.entry_points if point.group.startswith(GROUP)
                ])  # fmt: skip
        return cls(tuple(sorted(offer for offers in found.values() for offer in offers)))

    def with_classes(self, classes: Mapping[Offer, type]) -> Catalog:
        """This catalog and `classes` besides; one that the same owner defined before gives way to its new form."""
        new = {(offer.kind, offer.name, offer.distribution) for offer in classes}
        gone = {offer for offer in self.classes if (offer.kind, offer.name, offer.distribution) in new}
        kept = {offer: cls for offer, cls in self.classes.items() if offer not in gone}
        return Catalog(tuple(sorted({*self.all} - gone | {*classes})), {**kept, **classes})

    def offers(self, kind: str) -> list[Offer]:
        """What is on offer of one kind, by name."""
        return [offer for offer in self.all if offer.kind == kind]

    def names(self, kind: str) -> list[str]:
        """The names on offer of one kind, each once."""
        return sorted({offer.name for offer in self.offers(kind)})

    def find(self, kind: str, name: str) -> Offer:
        """The offer that `name` (or `distribution:name`) means.

        Raises:
            PluginError: nobody offers it, or several do.
        """
        distribution, _, bare = name.rpartition(":")
        found = [offer for offer in self.offers(kind) if offer.name == bare]
        if distribution:
            found = [offer for offer in found if _normal(offer.distribution) == _normal(distribution)]
        if not found:
            raise self._unknown(kind, name, bare)
        if len(found) > 1:
            raise PluginError(
                f"the {kind} `{bare}` is offered by {_and(f'{o.distribution} {o.version}' for o in found)}",
                expected="one owner of the name",
                fix="say which: " + " or ".join(f"`{o.distribution}:{o.name}`" for o in found),
            )
        return found[0]

    def load(self, offer: Offer) -> Any:
        """The class that `offer` names, imported.

        Raises:
            PluginError: its distribution wants another ptrain-core, its import fails, or it is no class of
                its kind; with distribution, version, cause, wanted and got.
        """
        if offer in self.classes:
            return _checked(offer, self.classes[offer])
        _check_requirement(offer)
        module, _, attributes = offer.value.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        except (Exception, SystemExit) as error:  # a plugin may fail in any way while it is imported
            raise _broken(offer, error) from error
        return _checked(offer, found)

    def status(self, offer: Offer) -> Status:
        """Whether `offer` can be used; this imports it."""
        try:
            self.load(offer)
        except PluginError as error:
            return Status("broken", str(error))
        owners = [o.distribution for o in self.offers(offer.kind) if o.name == offer.name]
        if len(owners) > 1:
            return Status("conflict", f"the name is offered by {_and(owners)}")
        return Status("ok")

    def _unknown(self, kind: str, name: str, bare: str) -> PluginError:
        from ptrain.recipe.elsewhere import part_elsewhere

        known = self.names(kind)
        message, listed = f"there is no {kind} `{name}`", ", ".join(f"`{n}`" for n in known)
        expected = f"one of {listed}" if listed else f"an installed package that offers one ({GROUP}{kind})"
        guess = closest(bare, known)
        kinds = sorted({offer.kind for offer in self.all if offer.name == bare} - {kind})
        if guess is None and (advice := part_elsewhere(kind, bare)):
            return PluginError(f"{message} here: {advice.reason}", expected=expected, fix=advice.fix)
        if guess is None and kinds:
            return PluginError(f"{message}: that is the name of a {' and of a '.join(kinds)}", expected=expected)
        install = "install the package that offers it, or give your own code with `--code FILE`"
        return PluginError(message, expected=expected, fix=f"write `{guess}`" if guess else install)


def _check_requirement(offer: Offer) -> None:
    """Refuse `offer` if its distribution declares that it needs another ptrain-core than this one."""
    if _normal(offer.distribution) == CORE:
        return
    try:
        running = importlib.metadata.version(CORE)
    except importlib.metadata.PackageNotFoundError:
        return
    for wanted in core_requirements(offer.distribution):
        if not wanted.specifier.contains(running, prereleases=True):
            raise PluginError(
                f"{offer.kind} {offer} needs another {CORE}: it wants {CORE}{wanted.specifier}, got {running}",
                expected=f"{CORE}{wanted.specifier}",
                fix=f"pip install --upgrade {offer.distribution} {CORE}",
            )


def core_requirements(distribution: str) -> list[Requirement]:
    """What an installed distribution declares that it needs of core, as far as it applies here."""
    try:
        declared = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for text in declared:
        with contextlib.suppress(InvalidRequirement):
            wanted = Requirement(text)
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            found += [wanted] if applies and _normal(wanted.name) == CORE else []
    return found


def _broken(offer: Offer, error: BaseException) -> PluginError:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing and missing.partition(".")[0] == offer.value.partition(":")[0].partition(".")[0]:
        fix = f"the installation is incomplete: pip install --force-reinstall {offer.distribution}"
    elif missing:
        fix = f"install what provides `{missing}`, or another version of {offer.distribution}"
    else:
        fix = f"install another version of {offer.distribution}, or remove it"
    return PluginError(
        f"{offer.kind} {offer} can't be loaded: {type(error).__name__}: {error}",
        expected=f"`{offer.value}` to be importable",
        fix=fix,
    )


def _checked(offer: Offer, found: Any) -> Any:
    """`found`, if it is a class as its kind wants it."""
    from ptrain.parts import KINDS

    base = KINDS.get(offer.kind)
    if base is None:
        return found
    if not (isinstance(found, type) and issubclass(found, base)):
        got = f"a class that is none ({found.__qualname__})" if isinstance(found, type) else type(found).__name__
        raise PluginError(
            f"{offer.kind} {offer} is {got}",
            expected=f"a subclass of `ptrain.{base.__name__}` at `{offer.value}`",
        )
    wanted: type = getattr(base, "Config", Config)
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and issubclass(config, wanted)):
        raise PluginError(
            f"the `Config` of {offer.kind} {offer} does not extend `{wanted.__name__}`",
            expected=f"`class Config({wanted.__name__}): ...` within `{found.__name__}`",
        )
    return found


def _and(names: Iterable[str]) -> str:
    *most, last = sorted(set(names))
    return f"{', '.join(most)} and {last}" if most else last


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
