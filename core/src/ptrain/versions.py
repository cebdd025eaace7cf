"""Versions of what results depend on."""

from __future__ import annotations


def versions() -> dict[str, str]:
    """Versions of Python, of the libraries that compute, and of every distribution that offers something to ptrain."""
    import importlib.metadata as metadata
    import platform

    from ptrain.catalog import Catalog

    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {offer.distribution: offer.version for offer in Catalog.installed().all}
    for name in ("torch", "deepspeed", "transformers", "datasets", "tokenizers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
