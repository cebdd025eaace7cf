"""What the distributions declare is true."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PLUGINS = ("sft", "dpo", "swiftkv", "spec-decode", "sequence-parallel", "embed")
OWN = {"core": "ptrain", "cli": "ptrain_cli"} | {f"plugins/{p}": f"ptrain_{p.replace('-', '_')}" for p in PLUGINS}
"""Where each distribution lives, and what it is imported as."""
HOMES = list(OWN)
PROVIDERS = {
    **packages_distributions(),
    "faiss": ["faiss-cpu"],
    "ptrain": ["ptrain-core"],
    "ptrain_cli": ["ptrain"],
    **{f"ptrain_{plugin.replace('-', '_')}": [f"ptrain-{plugin}"] for plugin in PLUGINS},
}
"""The distributions that a package comes with; an editable install does not say."""
script = ROOT / "tests" / "meta" / "load_entry_points.py"
spec = importlib.util.spec_from_file_location("load_entry_points", script)
entry_points = importlib.util.module_from_spec(spec)
spec.loader.exec_module(entry_points)


def project(home: str) -> dict:
    return tomllib.loads((ROOT / home / "pyproject.toml").read_text())["project"]


def normalised(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


@pytest.mark.torch_free
@pytest.mark.parametrize("point", entry_points.declared(), ids=lambda p: f"{p.group}:{p.name}")
def test_every_entry_point_loads(point) -> None:
    entry_points.check(point)


@pytest.mark.torch_free
def test_entry_points_load_without_torch() -> None:
    """`ptrain check` imports whatever a recipe names, so none of it may import torch."""
    code = (
        f"import runpy, sys; runpy.run_path({str(script)!r}, run_name='__main__');"
        "sys.exit(str(sorted({'torch', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules))) )"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]", done.stderr


@pytest.mark.torch_free
def test_installed_is_what_the_tree_declares() -> None:
    """A stale editable install would test other entry points than those in the tree."""
    installed = {(p.group, p.name, p.value) for p in entry_points.declared()}
    tables = [project(home) for home in HOMES]
    written = {
        (group, name, value)
        for table in tables
        for group, points in {
            **table.get("entry-points", {}),
            "console_scripts": table.get("scripts", {}),
        }.items()
        for name, value in points.items()
    }
    assert installed == written, "reinstall: pip install --no-deps " + " ".join(f"-e {home}" for home in HOMES)
    assert [version(t["name"]) for t in tables] == [t["version"] for t in tables]


@pytest.mark.torch_free
def test_one_licence() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    assert all((ROOT / home / "LICENSE").read_bytes() == text for home in HOMES)
    assert (ROOT / "cli/src/ptrain_cli/templates/shared/LICENSE.jinja").read_bytes() == text
    assert {project(home)["license"] for home in HOMES} == {"Apache-2.0"}


OF_EXTRAS = {
    "peft": ("ptrain/model/adapters.py", "ptrain/checkpoint/reload.py"),  # a recipe that asks for it is refused before
    "faiss": ("ptrain_embed/search.py",),  # chosen where it is there
    "mteb": ("ptrain_embed/mteb_model.py",),  # a task that asks for it is refused before
}
"""Modules that are reached only where the package of an extra is there, and import it without a guard."""


def imported(home: str) -> Iterator[tuple[str, bool, str]]:
    """`(package, guarded, place)` of every import in the sources of a distribution.

    An import inside `try: ... except ImportError` is guarded: the package is optional. Those for type
    checking alone don't count.
    """
    for path in sorted((ROOT / home / "src").rglob("*.py")):
        tree = ast.parse(path.read_text())
        tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
        guarded = {id(n) for t in tries for stmt in t.body for n in ast.walk(stmt)}
        checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        left_out = {id(n) for block in checking for stmt in block.body for n in ast.walk(stmt)}
        for node in ast.walk(tree):
            if id(node) in left_out:
                continue
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                package = name.split(".")[0]
                reached = str(path).endswith(OF_EXTRAS.get(package, ("-",)))
                yield package, reached or id(node) in guarded, f"{path.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize("home", HOMES)
def test_every_import_is_declared(home: str) -> None:
    """What a distribution imports stands in its dependencies, in its extras where the import is guarded.

    `ptrain.testing` may import the extra of that name: its fixtures are for pytest alone.
    """
    table = project(home)
    needed = {normalised(line) for line in table["dependencies"]}
    extras = {normalised(line) for lines in table.get("optional-dependencies", {}).values() for line in lines}
    for name, guarded, place in imported(home):
        if name in sys.stdlib_module_names or name == OWN[home]:
            continue
        found = {d.lower().replace("_", "-") for d in PROVIDERS.get(name, [name])}
        kit = {normalised(line) for line in table.get("optional-dependencies", {}).get("testing", [])}
        allowed = needed | (extras if guarded else kit if "/ptrain/testing/" in place else set())
        assert found & allowed, f"{place}: {name} is not declared by {table['name']}"


@pytest.mark.parametrize("home", HOMES)
def test_every_dependency_is_needed(home: str) -> None:
    """It is imported, or a comment beside it says what for."""
    used = {d.lower().replace("_", "-") for name, _, _ in imported(home) for d in PROVIDERS.get(name, [name])}
    text = (ROOT / home / "pyproject.toml").read_text()
    extras = [line for lines in project(home).get("optional-dependencies", {}).values() for line in lines]
    unused = [line for line in [*project(home)["dependencies"], *extras] if normalised(line) not in used]
    assert [line for line in unused if not re.search(rf'"{re.escape(line)}"[],]+ +# ', text)] == []
