"""Versions of what results depend on."""

from __future__ import annotations


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    import importlib.metadata as metadata
    import platform

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("ptrain-core", "ptrain-sft", "torch", "deepspeed", "transformers", "datasets", "tokenizers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
