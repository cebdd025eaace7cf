"""What a worker of the kit does: train a prepared run, as any worker would."""

from __future__ import annotations

from pathlib import Path


def train(spec: Path) -> None:
    """Train the run that was prepared; nothing else happens in this process.

    Raises:
        PtrainError: what a real run would show.
    """
    from ptrain.job import work

    work(spec)
