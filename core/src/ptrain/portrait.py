"""What an installed package offers, in detail: what it does at which stage, and the keys that it takes."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterator
from typing import Any

from ptrain.catalog import Catalog, Offer, core_requirements
from ptrain.errors import PluginError
from ptrain.layer import STAGES
from ptrain.parts import Trainer
from ptrain.recipe.config import Config
from ptrain.recipe.describe import describe
from ptrain.recipe.sections import DataConfig
from ptrain.recipe.suggest import closest


def portraits(catalog: Catalog, name: str) -> list[dict[str, Any]]:
    """Everything that `called` finds, in detail.

    Raises:
        PluginError: there is nothing.
    """
    return [_portrait(catalog, offer) for offer in called(catalog, name)]


def called(catalog: Catalog, name: str) -> list[Offer]:
    """Everything that has this name, or that a distribution of this name offers.

    Raises:
        PluginError: there is nothing.
    """
    found = [one for one in catalog.all if name in (one.name, one.distribution, f"{one.distribution}:{one.name}")]
    if not found:
        known = sorted({offer.name for offer in catalog.all} | {offer.distribution for offer in catalog.all})
        guess = closest(name, known)
        raise PluginError(
            f"nothing that is installed is called `{name}`", expected="a name or a package of `ptrain plugins list`",
            fix=f"write `{guess}`" if guess else "install the package that offers it",
        )  # fmt: skip
    return found


def _portrait(catalog: Catalog, offer: Offer) -> dict[str, Any]:
    """One offer; `error` says why it can't be used, and then nothing else is known of it."""
    about = {
        "kind": offer.kind, "name": offer.name, "distribution": offer.distribution, "version": offer.version,
        "licence": _licence(offer), "wants": ", ".join(map(str, core_requirements(offer.distribution))),
        "provides": offer.value,
    }  # fmt: skip
    status = catalog.status(offer)
    if status.state == "broken":
        return {**about, "error": status.reason}
    cls = catalog.load(offer)
    config: Any = getattr(cls, "Config", None)
    return {
        **about,
        "error": status.reason or None,
        "does": (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " "),
        "stages": list(_stages(cls)),
        "callbacks": [event for event, _ in getattr(cls, "callbacks", ())],
        "parts": dict(getattr(cls, "parts", {})),
        "keys": [] if config is None else list(_keys(config, Config)),
        "data": list(_keys(cls.Data, DataConfig)) if inspect.isclass(cls) and issubclass(cls, Trainer) else [],
    }


def _stages(cls: type) -> Iterator[dict[str, str]]:
    for stage in STAGES:
        options = getattr(getattr(cls, stage, None), "ptrain_impl", None)
        if options is not None:
            yield {"stage": stage, "role": "wraps" if options.get("wrapper") else "answers"}


def _keys(config: type[Config], base: type[Config]) -> Iterator[dict[str, Any]]:
    """The keys that `config` has beyond `base`."""
    for name, field in config.model_fields.items():
        if name != "type" and name not in base.model_fields:
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            text = " ".join((field.description or "").split())
            yield {"key": name, "takes": describe(field), "default": default, "does": text}


def _licence(offer: Offer) -> str:
    try:
        metadata = importlib.metadata.metadata(offer.distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return (metadata.get_all("License-Expression") or metadata.get_all("License") or [""])[0]
