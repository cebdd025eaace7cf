"""Plugins that can't be used, in packages that are really installed: one message that says whose, and exit code 2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch_free

Ptrain = Callable[..., tuple[int, str, str]]

FINE = """
import ptrain

class Mine(ptrain.Feature):
    @ptrain.hookimpl
    def on_end(self, run):
        pass
"""
ARGUMENT = FINE.replace("on_end(self, run)", "on_step_end(self, run, reslut)")
CASES = {
    "two of one name": (
        [("ptrain-a", "1.0", "a_mine", FINE, ""), ("ptrain-b", "2.0", "b_mine", FINE, "")],
        [
            "tiny.yaml:11:11: the plugin `mine` is offered by ptrain-a 1.0 and ptrain-b 2.0",
            "expected: one owner of the name",
            "fix: say which: `ptrain-a:mine` or `ptrain-b:mine`",
        ],
    ),
    "an import that fails": (
        [("ptrain-a", "1.0", "a_mine", "import no_such_module\n", "")],
        [
            "tiny.yaml:11:11: plugin `mine` of ptrain-a 1.0 can't be loaded: "
            "ModuleNotFoundError: No module named 'no_such_module'",
            "expected: `a_mine:Mine` to be importable",
            "fix: install what provides `no_such_module`, or another version of ptrain-a",
        ],
    ),
    "one for a newer API": (
        [("ptrain-a", "1.0", "a_mine", "raise SystemExit\n", "ptrain-core>=99,<100")],
        [
            "tiny.yaml:11:11: plugin `mine` of ptrain-a 1.0 needs another ptrain-core: it wants ptrain-core<100,>=99, got ",
            "expected: ptrain-core<100,>=99",
            "fix: pip install --upgrade ptrain-a ptrain-core",
        ],
    ),
    "an argument that there is not": (
        [("ptrain-a", "1.0", "a_mine", ARGUMENT, "")],
        [
            "a_mine.py:5:1: plugin `mine` (ptrain-a 1.0): stage `on_step_end` has no argument `reslut`",
            "expected: some of run, result",
        ],
    ),
    "a stage that there is not": (
        [("ptrain-a", "1.0", "a_mine", FINE.replace("on_end", "on_ennd"), "")],
        ["a_mine.py:5:1: plugin `mine` (ptrain-a 1.0): there is no stage `on_ennd`", "fix: call it `on_end`"],
    ),
    "of another kind": (
        [("ptrain-a", "1.0", "a_mine", FINE.replace("Feature", "Tracker"), "")],
        [
            "tiny.yaml:11:11: plugin `mine` of ptrain-a 1.0 is a class that is none (Mine)",
            "expected: a subclass of `ptrain.Feature` at `a_mine:Mine`",
        ],
    ),
}


def install(site: Path, name: str, version: str, module: str, code: str, wants: str) -> None:
    """Put a distribution with one feature, `mine`, into a folder."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    needs = f"Requires-Dist: {wants}\n" if wants else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    (info / "entry_points.txt").write_text(f"[ptrain.plugin]\nmine = {module}:Mine\n")
    (site / f"{module}.py").write_text(code)


@pytest.mark.parametrize("case", CASES)
def test_a_plugin_that_can_not_be_used(ptrain: Ptrain, recipe: Path, tmp_path: Path, case: str) -> None:
    """Found by `check`, and by `run` before anything is written; a recipe that doesn't use it doesn't notice."""
    packages, says = CASES[case]
    for package in packages:
        install(tmp_path / "site", *package)
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])}
    assert ptrain("check", recipe, env=env)[0] == 0
    recipe.write_text(recipe.read_text() + "plugins: {mine: {}}\n")
    before = {*tmp_path.iterdir()}
    for command in ("check", "run"):
        code, out, err = ptrain(command, recipe, env=env)
        assert (code, out) == (2, ""), err
        assert err.count("error: ") == 1 and "Traceback" not in err
        assert all(one in err for one in says), err
    assert {*tmp_path.iterdir()} == before
