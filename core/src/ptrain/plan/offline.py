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
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    loaded = [(sys.modules[module], name) for module, name in READ_ONCE if module in sys.modules]
    values = [(module, name, getattr(module, name)) for module, name in loaded if hasattr(module, name)]
    for module, name, _ in values:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name, value in values:
            setattr(module, name, value)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for module, name in READ_ONCE:
            # What was imported meanwhile read what stands here alone.
            if module in sys.modules and (sys.modules[module], name) not in loaded and hasattr(sys.modules[module], name):
                setattr(sys.modules[module], name, before[VARIABLES[0]] == "1")
