"""`ptrain plugins new`: what it writes installs, passes its tests, and trains, untouched; nothing is overwritten.

The packages are really built and installed, into a folder that is on the path of the processes here.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ptrain.errors import PluginError
from ptrain_cli.scaffold import new_plugin

Outcome = tuple[int, str, str]
Ptrain = Callable[..., Outcome]

ROOT = Path(__file__).parents[2]
KINDS = ("trainer", "source", "feature", "checkpoint")
LONGEST = "a-long-name-for-a-plugin-of-me"
SHOWN = {
    "trainer": ["stages: process (answers), loss (answers)", "callbacks: post-load", "gamma: a number of at least 0"],
    "source": ["pattern: text (default: '*.txt')"],
    "feature": ["step (wraps)", "save_state (answers)", "callbacks: post-evaluate", "decay: a number of at least 0"],
    "checkpoint": ["dtype: one of `bf16`, `fp16` (default: 'bf16')"],
}
"""What `ptrain plugins show` says of each."""


def python(*arguments: object, folder: Path, env: dict[str, str]) -> str:
    """What a Python process prints that has to go well."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, ptrain_in: Callable[[Path], Ptrain]) -> Path:
    """A folder with a new package of each kind."""
    home = tmp_path_factory.mktemp("new")
    for kind in KINDS:
        code, out, err = ptrain_in(home)("plugins", "new", f"my-{kind}", "--kind", kind)
        assert code == 0, err
        assert out.splitlines()[-4:] == [
            f"  cd ptrain-my-{kind}", "  pip install -e '.[test]'", "  pytest", "  ptrain run recipe.yaml",
        ]  # fmt: skip
    return home


@pytest.fixture(scope="module")
def installed(home: Path, environ: dict[str, str]) -> dict[str, str]:
    """An environment in which all of them are installed."""
    pytest.importorskip("hatchling", reason="the packages are built here, without a download")
    site = home / "site"
    packages = [home / f"ptrain-my-{kind}" for kind in KINDS]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site]
    python("-m", "pip", "install", *options, *packages, folder=home, env=environ)
    path = os.pathsep.join([str(site), environ.get("PYTHONPATH", "")])
    return {**environ, "PYTHONPATH": path, "HOME": str(home), "HF_HUB_OFFLINE": "1"}


def test_their_tests_pass(home: Path, installed: dict[str, str]) -> None:
    """In one process for all, which makes the tiny model once; files of one name need `importlib` then."""
    options = ["-v", "--rootdir=.", "--import-mode=importlib", "-p", "no:cacheprovider"]
    out = python("-m", "pytest", *options, *(f"ptrain-my-{kind}" for kind in KINDS), folder=home, env=installed)
    for kind in KINDS:
        assert re.search(rf"ptrain-my-{kind}/tests/test_plugin.py::test_contract\[\w+\] PASSED", out), out


@pytest.mark.parametrize("kind", KINDS)
def test_its_recipe_runs(home: Path, installed: dict[str, str], kind: str) -> None:
    folder = home / f"ptrain-my-{kind}"
    python("-m", "ptrain_cli", "run", "recipe.yaml", folder=folder, env=installed)
    run = folder / "runs" / "recipe" / "latest"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 60 and losses[-1] < losses[0] / 1.3
    left = {
        "trainer": "predicted" in lines[0] and (run / "model" / "latest").exists(),
        "source": losses[-1] < 1,  # of three transcripts
        "feature": "loss_mean" in lines[0] and "eval/perplexity" in lines[-1],
        "checkpoint": len([*run.glob("my-checkpoint/step-*/weights.safetensors")]) == 2,
    }
    assert left[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_shown(home: Path, installed: dict[str, str], kind: str) -> None:
    out = python("-m", "ptrain_cli", "plugins", "show", f"my-{kind}", folder=home, env=installed)
    group = "plugin" if kind == "feature" else kind
    assert out.startswith(f"{group} my-{kind} (ptrain-my-{kind} 0.1.0, Apache-2.0, wants ptrain-core<1,>=0.1.0)\n")
    assert all(one in out for one in SHOWN[kind]), out


def test_a_distribution_is_whole(tmp_path: Path) -> None:
    for kind in KINDS:
        _, folder = new_plugin(f"my-{kind}", kind, tmp_path / kind)
        assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
        written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        package = f"src/ptrain_my_{kind}"
        assert written >= {
            ".github/workflows/test.yml", ".gitignore", "README.md", "pyproject.toml", "recipe.yaml",
            f"{package}/__init__.py", f"{package}/plugin.py", f"{package}/py.typed", "tests/test_plugin.py",
        }  # fmt: skip
        assert not any(word in (folder / name).read_text() for name in written for word in ("<<", ">>", "<%", "jinja"))


def test_style_and_types(home: Path, tmp_path: Path) -> None:
    """With the settings that are written, whatever the length of the name, and with pyright's own."""
    pytest.importorskip("ruff", reason="the tools are not installed")
    for kind in KINDS:
        for name in ("z", LONGEST):
            new_plugin(name, kind, tmp_path / f"{kind}-{name}")
    tools = Path(sys.executable).parent
    folders = [*(home / f"ptrain-my-{kind}" for kind in KINDS), tmp_path]
    rules = "lint.select=['E', 'F', 'W', 'I', 'B', 'UP', 'SIM', 'C4', 'PTH', 'RET']"
    for command in (["check", "--config", rules], ["format", "--check"]):
        done = subprocess.run([tools / "ruff", *command, "--no-cache", *folders], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    sources = [path for kind in KINDS for path in (home / f"ptrain-my-{kind}" / "src").rglob("*.py")]
    done = subprocess.run(
        [tools / "pyright", "--pythonpath", sys.executable, *sources], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


BAD_NAMES = [
    ("My-Trainer", ["can't be the name", "expected: up to 30 lower-case", "fix: write `my-trainer`"]),
    ("my_trainer", ["can't be the name", "fix: write `my-trainer`"]),
    ("MyTrainer", ["fix: write `my-trainer`"]),
    ("3d", ["can't be the name", "beginning with a letter"]),
    ("a--b", ["can't be the name", "fix: write `a-b`"]),
    ("../elsewhere", ["can't be the name", "fix: write `elsewhere`"]),
    ("ptrain-", ["can't be the name"]),
    ("null", ["in a recipe it is a value"]),
    ("x" * 31, ["can't be the name", "expected: up to 30"]),
    ("sft", ["there is a trainer `sft` already: ptrain-sft 0.1.0 offers it", "fix: choose another name"]),
    ("ptrain-sft", ["there is a trainer `sft` already"]),
    ("biencoder", ["the trainer `biencoder` is known already: it comes with the package ptrain-embed"]),
    ("core", ["the package ptrain-core 0.1.0 is there already"]),
    ("cli", ["there is a package `ptrain_cli` already"]),
]


@pytest.mark.torch_free
def test_names_that_can_not_be(ptrain: Ptrain, tmp_path: Path) -> None:
    for name, says in BAD_NAMES:
        with pytest.raises(PluginError) as refused:
            new_plugin(name, "trainer", tmp_path / "new")
        assert all(one in str(refused.value) for one in says), refused.value
    code, _, err = ptrain("plugins", "new", "jsonl", "--kind", "source")
    assert code == 2 and "there is a source `jsonl` already: ptrain-core 0.1.0 offers it" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torch_free
def test_nothing_is_overwritten(ptrain: Ptrain, ptrain_in: Callable[[Path], Ptrain], tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for folder, says in [
        ("used", "used` is not empty"),
        ("file", "file` is no folder"),
        ("link", "link` is no folder"),
        ("no/where", "there is no folder"),
    ]:
        with pytest.raises(PluginError, match=says):
            new_plugin("mine", "trainer", tmp_path / folder)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert ptrain("plugins", "new", "ptrain-mine", "--to", "empty")[0] == 0
    assert 'name = "ptrain-mine"' in (tmp_path / "empty" / "pyproject.toml").read_text()
    (tmp_path / "here").mkdir()
    assert ptrain_in(tmp_path / "here")("plugins", "new", "mine", "--to", ".")[0] == 0
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        path.name for path in (tmp_path / "empty").iterdir()
    }
    code, out, err = ptrain("plugins", "new", "mine", "--to", "empty")
    assert (code, out) == (2, "") and "`empty` is not empty" in err and "`--to FOLDER`" in err


@pytest.mark.torch_free
def test_a_failure_leaves_nothing(ptrain: Ptrain, mount: Callable[[Path, str], Path], tmp_path: Path) -> None:
    """On a disk that is full in the middle of it."""
    small = mount(tmp_path / "small", "size=16k")
    code, _, err = ptrain("plugins", "new", "mine", "--to", small / "mine")
    assert code == 2 and "can't be written: No space left on device" in err and "`--to FOLDER`" in err
    assert list(small.iterdir()) == []


@pytest.mark.torch_free
def test_permissions_are_those_of_other_files(ptrain: Ptrain, tmp_path: Path) -> None:
    assert ptrain("plugins", "new", "mine")[0] == 0
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE((tmp_path / "ptrain-mine").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
