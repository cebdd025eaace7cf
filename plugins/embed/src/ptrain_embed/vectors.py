"""Embeddings on disk: a file that grows text by text, so that whoever is stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ptrain import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK = 4096
"""Texts that are embedded before they are noted as done."""


class Texts(Protocol):
    """Texts that are read a slice at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


def embedded(
    path: Path,
    texts: Texts,
    encode: Callable[[Sequence[str]], torch.Tensor],
    made_of: Mapping[str, Any],
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """The embeddings of texts [n, d] fp32, mapped from `path`, where those that are missing are added.

    Args:
        path: ends in `.npy`; beside it a `.json` says what it holds and how far it is.
        encode: gives the embeddings [m, d] of some texts.
        made_of: what embeddings depend on; a file of another one is begun anew.
        progress: is told how many texts were embedded since the last call, those of earlier calls first.

    Raises:
        DataError: the disk is too small for it.
    """
    import numpy as np

    note, made_of = path.with_suffix(".json"), {**made_of, "count": len(texts)}
    state = read_note(note)
    if state.get("made_of") != made_of or not path.exists():
        state = {"made_of": made_of, "done": 0}
    done = state["done"]
    progress(done)
    while done < len(texts):
        new = encode(texts[done : done + CHUNK]).numpy()
        file = np.load(path, mmap_mode="r+") if done else _begun(path, (len(texts), new.shape[1]))
        file[done : done + len(new)] = new
        file.flush()
        done += len(new)
        write_note(note, {"made_of": made_of, "done": done})
        progress(len(new))
    return np.load(path, mmap_mode="r")


def read_note(path: Path) -> dict[str, Any]:
    """What a note says; nothing where there is none or it can't be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write a note; it is there whole, or as it was before."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _begun(path: Path, shape: tuple[int, int]) -> Any:
    """A new file for embeddings of this shape."""
    import shutil

    import numpy as np

    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    needed, free = 4 * shape[0] * shape[1], shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"embeddings of {shape[0]:,} texts take {needed:,} bytes, and `{path.parent}` has {free:,} free",
            fix="free some space, or write to another disk",
        )
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
