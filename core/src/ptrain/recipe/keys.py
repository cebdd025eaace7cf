"""The keys that a recipe may have: for completion, so nothing here is an error."""

from __future__ import annotations

from ptrain.catalog import Catalog
from ptrain.recipe.document import Document
from ptrain.recipe.elsewhere import keys_of
from ptrain.recipe.explain import Explainer
from ptrain.recipe.gather import gather
from ptrain.recipe.names import LISTS, SECTIONS, dotted
from ptrain.recipe.resolve import Resolver
from ptrain.recipe.spelling import top_level

PLAIN = ("model", "data", "logger", "wandb", "deepspeed")
"""Sections without a default, which may still be given."""


def known_keys(document: Document, catalog: Catalog) -> dict[str, set[str]]:
    """The keys of each section in every spelling, by its dotted place; "" is the top level.

    They are those of the parts that the recipe chooses, or that are the default; where it names no trainer, of all.
    """
    data = {**{label: {} for label in PLAIN}, **document.data}
    given = data.get("type")
    known = Explainer(document, lambda label: {})
    for name in [given] if given in catalog.names("trainer") else catalog.names("trainer"):
        resolver = Resolver(Document({**data, "type": name}), catalog)
        _, trainer = resolver.trainer()
        if trainer is not None:
            found = gather(resolver, name, trainer)
            known.knows("", top_level(found.features.values()))
            for section in found:
                known.knows(dotted(section.place), section.accepts, section.config)
    known.knows("", SECTIONS | {"type"} | keys_of(catalog.names("plugin")))
    known.knows("plugins", catalog.names("plugin"))
    return known.accepted


def continuations(begun: str, keys: dict[str, set[str]]) -> list[str]:
    """What `begun`, the beginning of an override, may become: `optimizer.` for a section, `optimizer.lr=` for a key."""
    head = begun[: begun.rfind(".") + 1]
    found: set[str] = set()
    for label, names in keys.items():
        for path in (f"{label}.{name}" if label else name for name in names):
            if path.startswith(begun):
                step, dot, _ = path[len(head) :].partition(".")
                found.add(f"{head}{step}{dot or '='}")
    # A section is set key by key; a list may also be set as a whole.
    return sorted(one for one in found if one.removesuffix("=") not in keys or one.removesuffix("=") in LISTS)
