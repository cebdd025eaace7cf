"""Nothing is downloaded while a plan is made: what is not here is said to be missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
READ_ONCE = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
)
"""Where libraries keep what the variables said when they were imported."""


@contextmanager
def offline() -> Iterator[None]:
    """Within it, the libraries of the hub find what is in their caches and ask nobody."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    loaded = {(module, name): getattr(sys.modules[module], name) for module, name in _there()}
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    for module, name in loaded:
        setattr(sys.modules[module], name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        asked = before["HF_HUB_OFFLINE"] in ("1", "ON", "YES", "TRUE")
        for module, name in _there():
            # What was imported meanwhile knows only what the variables said within.
            setattr(sys.modules[module], name, loaded.get((module, name), asked))


def _there() -> list[tuple[str, str]]:
    """Those of `READ_ONCE` that are imported and have the name."""
    return [(module, name) for module, name in READ_ONCE if hasattr(sys.modules.get(module), name)]
