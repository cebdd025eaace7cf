"""Loading by name from the Hugging Face hub or a folder: one clear error where it fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from ptrain.errors import MissingModel, ModelError

NAME = "the name of a model on the hub (with network), or a local folder that `save_pretrained` wrote"
"""What a `name_or_path` may be."""


UNASKED = "it is not in the cache of the hub, and the hub is not asked"
"""What is wrong where the network is switched off."""

FILES = {
    "model": ["config.json", "adapter_config.json"],
    "tokenizer": ["tokenizer.json", "tokenizer*", "vocab*", "*.model"],
}
"""What a folder holds at least one of; the first is what there is nowadays."""


def path_fault(name: str) -> str | None:
    """What is wrong with a name that can only be a path, or is one; None where it may be right.

    A name on the hub has one slash at most.
    """
    path = Path(name)
    if path.is_dir():
        return None
    if path.exists():
        return "that is a file"
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return "there is no such folder"
    return None


def folder_fault(what: str, name: str) -> str | None:
    """What a folder lacks that is to hold a model (or a tokenizer); None where there is no folder, or it has that."""
    folder, patterns = Path(name), FILES["model" if what == "model" else "tokenizer"]
    if not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in patterns):
        return None
    return f"it is a folder without a `{patterns[0]}`"


@contextlib.contextmanager
def explained(what: str, name: str) -> Iterator[None]:
    """Turns what transformers and the hub raise while they load `name` into one error.

    Args:
        what: "model", "tokenizer" or "tokenizer of the model".

    Raises:
        MissingModel: it is not here.
        ModelError: it can't be loaded.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import StrictDataclassError

    if fault := path_fault(name):
        raise MissingModel(f"the {what} `{name}` can't be loaded: {fault}", expected=NAME)
    try:
        with _quiet():
            yield
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        absent = isinstance(error, OSError) and not Path(name).is_dir()
        reason = UNASKED if absent and is_offline_mode() else folder_fault(what, name) or said(error)
        kind = MissingModel if absent else ModelError
        raise kind(f"the {what} `{name}` can't be loaded: {reason}", expected=NAME) from error


def said(error: Exception) -> str:
    """The line of an error that says most: of a failed check of a configuration, the last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "alidation error" in lines[0] else 0].strip()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub's line for each attempt and transformers' table of weights: what they come to is shown."""
    logs = [logging.getLogger(name) for name in ("huggingface_hub", "transformers.modeling_utils")]
    for log in logs:
        log.addFilter(_worse_than_warnings)  # another level would have transformers say other things
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(_worse_than_warnings)


def _worse_than_warnings(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING
