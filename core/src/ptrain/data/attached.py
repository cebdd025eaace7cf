"""A loader whose batches carry something more: for wrappers of the stage `create_dataloader`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Attached:
    """The loader `loader`, of which each batch goes through `attach` first; in all else it is the same loader."""

    def __init__(self, loader: Any, attach: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._loader, self._attach = loader, attach

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._attach, self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
