"""What `ptrain --version` says."""

from __future__ import annotations

import importlib.metadata
import platform


def describe() -> str:
    """The versions of ptrain and of what results depend on; nothing is imported for it."""
    names = ("ptrain-core", "torch", "deepspeed", "transformers")
    known = [f"{name} {version}" for name in names if (version := _version(name))]
    return f"ptrain {_version('ptrain')} ({', '.join([*known, f'Python {platform.python_version()}'])})"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
