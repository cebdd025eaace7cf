"""What a worker of the kit does: train a prepared run, as any worker would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def train(spec: Path) -> None:
    """Train the run that was prepared; nothing else happens in this process.

    Raises:
        PtrainError: what a real run would show.
    """
    from ptrain.job import work

    work(spec)


def write_fingerprint(kind: str, name: str, config: Mapping[str, Any], file: Path) -> None:
    """Write what a source with this section calls its rows."""
    from ptrain.catalog import Catalog

    catalog = Catalog.installed()
    cls = catalog.load(catalog.find(kind, name))
    file.write_text(json.dumps(cls(cls.Config.model_validate(config)).fingerprint()), encoding="utf-8")
