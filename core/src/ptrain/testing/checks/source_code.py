"""What a plugin's source reads: for keys that no run of a tiny recipe comes to."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def attributes_read(cls: Any) -> set[str]:
    """The names of all attributes that are read, or named in `getattr`, in the source of the plugin.

    That is the package of the class, and the modules of the classes of ptrain that it extends.
    """
    return {name for path in _files(cls) for name in _read(ast.parse(path.read_text(encoding="utf-8")))}


def _files(cls: Any) -> set[Path]:
    found: set[Path] = set()
    for one in inspect.getmro(cls):
        top = one.__module__.partition(".")[0]
        if top == "builtins" or one.__module__ == "ptrain.parts":
            continue
        file = Path(inspect.getfile(one))
        # A package of its own is looked through whole, of ptrain the module alone: the rest reads other sections.
        package = _package(file, one.__module__) if top != "ptrain" else None
        found |= set(package.rglob("*.py")) if package is not None else {file}
    return found


def _package(file: Path, module: str) -> Path | None:
    """The folder of the package at the top of a module, or None where it is a file alone."""
    depth = module.count(".") + (file.name == "__init__.py")
    return file.parents[depth - 1] if depth else None


def _read(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            yield from (str(one.value) for one in node.args[1:2] if isinstance(one, ast.Constant))
