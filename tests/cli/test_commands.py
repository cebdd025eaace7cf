"""Commands of other packages: offered by entry points, imported when called."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch_free

Ptrain = Callable[..., tuple[int, str, str]]

MODULE = """
print("imported")
import typer

def greet(name: str) -> int:
    '''Greet somebody.'''
    print(f"hello {name}")
    return 3

several = typer.Typer(help="Several commands.")

@several.command()
def one() -> None:
    '''The first.'''
    print("one")

@several.command()
def two() -> None:
    '''The second.'''
"""
POINTS = """[ptrain.command]
greet = greeter:greet
several = greeter:several
broken = greeter:missing
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment in which the distribution `ptrain-greeter` is installed."""
    site = tmp_path / "site"
    info = site / "ptrain_greeter-1.2.dist-info"
    info.mkdir(parents=True)
    (site / "greeter.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ptrain-greeter\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(POINTS)
    return {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


def test_they_are_listed_without_an_import(ptrain: Ptrain, installed: dict[str, str]) -> None:
    code, out, _ = ptrain("--help", env=installed)
    assert code == 0
    assert "imported" not in out
    assert "greet " in out and "A command of the package ptrain-greeter." in out


def test_a_function_is_a_command(ptrain: Ptrain, installed: dict[str, str]) -> None:
    assert ptrain("greet", "you", env=installed) == (3, "imported\nhello you\n", "")
    assert "Greet somebody." in ptrain("greet", "--help", env=installed)[1]
    code, _, err = ptrain("greet", env=installed)
    assert code == 2 and "Missing argument" in err


def test_a_typer_app_is_a_group(ptrain: Ptrain, installed: dict[str, str]) -> None:
    assert ptrain("several", "one", env=installed) == (0, "imported\none\n", "")
    assert "The second." in ptrain("several", "--help", env=installed)[1]


def test_a_broken_one_fails_only_when_called(ptrain: Ptrain, installed: dict[str, str], recipe: Path) -> None:
    code, _, err = ptrain("broken", env=installed)
    assert code == 2
    assert "ptrain-greeter 1.2" in err and "missing" in err and "Traceback" not in err
    assert ptrain("check", recipe, env=installed)[0] == 0


def test_a_mistyped_one_is_suggested(ptrain: Ptrain, installed: dict[str, str]) -> None:
    code, _, err = ptrain("gret", env=installed)
    assert code == 2 and "'greet'" in err


def test_own_commands_win(ptrain: Ptrain, installed: dict[str, str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "site" / "ptrain_greeter-1.2.dist-info" / "entry_points.txt").write_text(
        "[ptrain.command]\ncheck = greeter:greet\n"
    )
    assert ptrain("check", recipe, env=installed)[1] == f"ok: {recipe} (sft)\n"


def test_plugins_list_shows_what_is_broken(ptrain: Ptrain, installed: dict[str, str]) -> None:
    code, out, _ = ptrain("plugins", "list", env=installed)
    lines = out.splitlines()
    assert code == 0
    assert lines[1].split() == ["kind", "name", "distribution", "version", "status", "provides"]
    rows = {tuple(line.split()[:2]): line.split() for line in lines[2:] if line}
    assert rows["command", "greet"][2:5] == ["ptrain-greeter", "1.2", "ok"]
    assert rows["command", "broken"][2:5] == ["ptrain-greeter", "1.2", "broken"]
    assert rows["trainer", "sft"][2:5] == ["ptrain-sft", "0.1.0", "ok"]
    assert any(line.startswith("command broken: ") and "greeter" in line for line in lines)


def test_plugins_show(ptrain: Ptrain, installed: dict[str, str]) -> None:
    """What it does at which stage, its keys with defaults and their documentation, and what it asks for."""
    code, out, err = ptrain("plugins", "show", "dpo")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "trainer dpo (ptrain-dpo 0.1.0, Apache-2.0, wants ptrain-core<1,>=0.1)"
    assert "  ptrain_dpo.plugin:DPO" in lines
    (stages,) = (line for line in lines if line.startswith("  stages: "))
    assert "loss (answers)" in stages and "prepare_batch (wraps)" in stages and "step" not in stages
    at = lines.index("    beta: a number of more than 0 (default: 0.1)")
    assert "held to the reference" in lines[at + 1]
    assert lines.index("  keys of `data`:") < lines.index(
        "    max_prompt_length: a whole number of at least 1 (default: None)"
    )
    code, out, _ = ptrain("plugins", "show", "ptrain-sft", "--json")
    assert code == 0 and [one["name"] for one in json.loads(out)] == ["causal", "sft"]


def test_plugins_show_of_what_is_broken_or_absent(ptrain: Ptrain, installed: dict[str, str]) -> None:
    code, out, _ = ptrain("plugins", "show", "broken", env=installed)
    assert code == 1 and "can't be used: command `broken` of ptrain-greeter 1.2 can't be loaded" in out
    code, out, _ = ptrain("plugins", "show", "greet", env=installed)
    assert code == 0 and "greeter:greet" in out
    code, _, err = ptrain("plugins", "show", "dpoo")
    assert code == 2 and "nothing that is installed is called `dpoo`" in err and "write `dpo`" in err
