"""The sections of a recipe, each with the class that owns it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ptrain.catalog import Offer
from ptrain.errors import PluginError, Problem
from ptrain.recipe import sections
from ptrain.recipe.deepspeed import take_refused
from ptrain.recipe.deepspeed_keys import DeepSpeedConfig
from ptrain.recipe.document import Place
from ptrain.recipe.elsewhere import FEATURES, part_elsewhere
from ptrain.recipe.names import CORE_KEYS, LISTS, REQUIRED, SECTIONS, SINGLE, SOURCES, is_note, show
from ptrain.recipe.resolve import Resolver, Section


@dataclass
class Gathered:
    """Every section of a recipe whose owner could be found.

    Attributes:
        core: the top-level keys of core; `own`: those of the trainer.
        single: the sections that stand alone, by label; `features`: those of `plugins`, by name.
        lists: the entries of each list of parts, by label ("checkpoint", "data.sources", ...).
    """

    core: Section
    own: Section
    single: dict[str, Section] = field(default_factory=dict)
    features: dict[str, Section] = field(default_factory=dict)
    lists: dict[str, list[Section]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Section]:
        """All sections; the entries of lists before `data`, whose config holds the sources'."""
        yield from (self.core, self.own, *self.features.values())
        for entries in self.lists.values():
            yield from entries
        yield from self.single.values()


def gather(resolver: Resolver, name: str, trainer: Any) -> Gathered:
    """Find the owner of every section; what has none was noted in `resolver`."""
    data = resolver.document.data
    own = Section("", (), {}, trainer.Config, trainer)
    core = Section("", (), {key: value for key, value in data.items() if key in CORE_KEYS}, sections.CoreConfig)
    own.data = {key: value for key, value in data.items() if key in own.accepts}
    found = Gathered(core, own)
    for label, kind in SINGLE.items():
        if label in data or label not in REQUIRED:
            part = resolver.part(label, (label,), data.get(label, {}), kind)
            found.single |= {label: part} if part else {}
    for label, kind in LISTS.items():
        value = data.get(label, resolver.defaults.get(kind))
        if value is not None or label in data:
            _add_list(found, resolver, label, (label,), value, kind)
    _add_features(found, resolver)
    _add_plain(found, resolver)
    _add_data(found, resolver, name, trainer)
    return found


def _add_list(found: Gathered, resolver: Resolver, label: str, place: Place, value: Any, kind: str) -> None:
    entries = resolver.parts(label, place, value, kind)
    found.lists[label] = [section for section in entries if section is not None]


def _add_features(found: Gathered, resolver: Resolver) -> None:
    written = resolver.mapping(("plugins",), resolver.document.data.get("plugins", {})) or {}
    for name, value in {**written, **_implied(resolver, written)}.items():
        if is_note(name):
            continue
        place = ("plugins", name)
        feature = resolver.load("plugin", name, resolver.document.position(place))
        keys = {} if value is None else resolver.mapping(place, value)
        if feature is not None and keys is not None:
            found.features[name] = Section(f"plugins.{name}", place, keys, feature.Config, feature)


def _implied(resolver: Resolver, written: Mapping[str, Any]) -> dict[str, Any]:
    """The features that top-level keys of the recipe mean, and that it does not name."""
    document, named = resolver.document, {name.rpartition(":")[2] for name in written}
    found = {}
    for key, feature in FEATURES.items():
        if key in document.data and feature not in named and feature in resolver.catalog.names("plugin"):
            document.keys.setdefault(("plugins", feature), document.position((key,)))
            found[feature] = {}
    return found


def _add_plain(found: Gathered, resolver: Resolver) -> None:
    """Add the sections that no part owns."""
    owners = {
        "logger": sections.LoggerConfig,
        "wandb": sections.WandbConfig,
        "deepspeed": DeepSpeedConfig,
    }
    for label, config in owners.items():
        if label not in resolver.document.data:
            continue
        keys = resolver.mapping((label,), resolver.document.data[label])
        if keys is not None and label == "deepspeed":
            keys, refused = take_refused(resolver.document, keys)
            resolver.problems += refused
        if keys is not None:
            found.single[label] = Section(label, (label,), keys, config)


def _add_data(found: Gathered, resolver: Resolver, name: str, trainer: Any) -> None:
    if "data" not in resolver.document.data:
        return
    keys = resolver.mapping(("data",), resolver.document.data["data"])
    if keys is None:
        return
    _check_data_type(resolver, keys.get("type"), name)
    for label in SOURCES:
        if label in keys:
            _add_list(found, resolver, f"data.{label}", ("data", label), keys[label], "source")
    found.single["data"] = Section("data", ("data",), keys, trainer.Data, type=name)


def _check_data_type(resolver: Resolver, given: Any, name: str) -> None:
    """`data.type` may only repeat the trainer's name."""
    bare = name.rpartition(":")[2]
    if given in (None, "", name, bare):
        return
    advice = part_elsewhere("data", str(given))
    fix = advice.fix if advice else "leave it out"
    if given in resolver.catalog.names("source"):
        fix = f"it is a type of source: write `{{type: {given}, ...}}` in `data.sources`"
    resolver.problems.append(
        Problem(
            f"`data.type` is {show(given)}, but the trainer, which owns `data`, is `{bare}`",
            resolver.document.value_position(("data", "type")),
            f"`{bare}`",
            fix,
        )
    )


def refuse_taken_names(keys: Iterable[str], offer: Offer) -> None:
    """Raise PluginError where one of the top-level `keys` of a trainer or feature is core's key or section."""
    taken = {*keys} & (CORE_KEYS | SECTIONS | {"type", "trainer"})
    if taken:
        names = ", ".join(f"`{name}`" for name in sorted(taken))
        raise PluginError(
            f"the `Config` of {offer.kind} {offer} takes {names}, which core owns", expected="names of its own"
        )
