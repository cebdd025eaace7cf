"""Tiny recipes as mappings, for any trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptrain.testing.rows import SHAPES, write_rows

KNOWN = {"sft": "conversations", "causal": "text", "dpo": "preferences", "embed": "pairs"}
"""The shape of rows that a trainer takes, where it is known."""
ROWS = 17
LONGEST = 256
EXPORT = {"type": "huggingface", "save_end_of_training": True, "verify": False}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes`; a list takes the place of a list."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


@dataclass
class Material:
    """What tiny recipes are made of: a model, and data files that are written when they are first asked for.

    Attributes:
        folder: for data and for the cache of prepared data.
        model: the folder of the model.
    """

    folder: Path
    model: Path
    _files: dict[str, Path] = field(default_factory=dict)

    def data(self, shape: str = "conversations") -> Path:
        """A file of JSON lines; `shape` is one of `SHAPES`.

        Raises:
            ValueError: it is none.
        """
        if shape not in SHAPES:
            raise ValueError(f"there is no shape of rows `{shape}`; there are: {', '.join(SHAPES)}")
        if shape not in self._files:
            self._files[shape] = write_rows(self.folder / f"{shape}.jsonl", SHAPES[shape](ROWS))
        return self._files[shape]

    def recipe(self, type: str = "sft", rows: str | None = None, **changes: Any) -> dict[str, Any]:
        """A recipe of a few fast steps in fp32, with nested `changes`.

        Args:
            type: the trainer.
            rows: the shape of its rows; by default that of a trainer that is known, else conversations.
        """
        shape = rows or KNOWN.get(type, "conversations")
        base: dict[str, Any] = {
            "type": type,
            "model": {"name_or_path": str(self.model), "dtype": "fp32"},
            "tokenizer": {"chat_template": "chatml"},
            "data": {
                "sources": [{"type": "jsonl", "path": str(self.data(shape))}],
                "cache_dir": str(self.folder / "cache"),
                "max_length": 48 if shape == "text" else LONGEST,
            },
            "optimizer": {"lr": 1e-3},
            "micro_batch_size": 4,
            "train_iters": 4,
            "loss_log_interval": 0,
            "checkpoint": [EXPORT],
        }
        return merged(base, changes)
