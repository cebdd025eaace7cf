"""All checks of everything that a name stands for, one after the other: what `ptrain plugins check` does."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.errors import PluginError

if TYPE_CHECKING:
    from ptrain.catalog import Catalog, Offer
    from ptrain.testing.checks import Check, Outcome


def subjects(catalog: Catalog, name: str) -> list[Offer]:
    """What can be checked of everything that has this name, or that a distribution of this name offers.

    Raises:
        PluginError: there is nothing of this name, or nothing that can be checked.
    """
    from ptrain.parts import KINDS
    from ptrain.portrait import called

    found = [offer for offer in called(catalog, name) if offer.kind in KINDS]
    if not found:
        raise PluginError(f"`{name}` is a command: there are no checks for it", expected="one of " + ", ".join(KINDS))
    return found


def check_all(offers: list[Offer], changes: Mapping[str, Any]) -> Iterator[tuple[Offer, Check, Outcome | None]]:
    """Every check of every offer: once with None before it is made, and again with what came of it.

    Args:
        changes: keys that the tiny recipe of the checks needs besides.
    """
    from ptrain.testing.checks import applicable
    from ptrain.testing.model import make_model
    from ptrain.testing.study import Study

    with tempfile.TemporaryDirectory(prefix="ptrain-check-") as folder:
        model = make_model(Path(folder) / "model")
        for offer in offers:
            own = Path(folder) / f"{offer.kind}-{offer.name}"
            own.mkdir()
            study = Study(offer.kind, offer.name, changes, own, model)
            for check in applicable(offer.kind):
                yield offer, check, None
                # What its runs print is no concern of who reads the table.
                with contextlib.redirect_stdout(io.StringIO()):
                    outcome = check.outcome(study)
                yield offer, check, outcome
