"""Run directories: their names, which one a resumed run goes on in, and what is written down of a start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from ptrain import directory
from ptrain.checks import check_space
from ptrain.directory import commit, make_directory, newest_run, run_directory, starts, write_spec
from ptrain.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from ptrain.run import Run

RECIPE = SimpleNamespace(output_dir=None, type="sft")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(path: Path) -> Path:
    """The directory of a run that was begun."""
    path.mkdir(parents=True)
    write_spec(path, {"recipe": {}, "starts": []}, {})
    return path


def test_each_run_has_a_directory_of_its_own(here: Path) -> None:
    first = made(run_directory(RECIPE, Path("mine.yaml")))
    assert first.parent == here / "runs" / "mine"
    assert directory.OURS.fullmatch(first.name)
    second = made(run_directory(RECIPE, Path("mine.yaml")))
    assert first != second
    assert (here / "runs" / "mine" / "latest").resolve() == second


def test_without_a_file_it_is_called_after_the_trainer(here: Path) -> None:
    assert run_directory(RECIPE, None).parent == here / "runs" / "sft"


def test_resuming_takes_the_newest(here: Path) -> None:
    parent = here / "runs" / "mine"
    assert run_directory(RECIPE, Path("mine.yaml"), resume=True).parent == parent  # there is none: a new one
    names = ["2026-01-02T03-04-05Z", "2026-01-02T03-04-05Z-2", "2026-01-02T03-04-05Z-10", "2025-12-31T23-59-59Z"]
    for name in names:
        made(parent / name)
    (parent / "2027-01-01T00-00-00Z").mkdir()  # its preparation failed: there is nothing to go on with
    made(parent / "notes")
    assert run_directory(RECIPE, Path("mine.yaml"), resume=True) == parent / names[2]
    assert newest_run(here / "nowhere") is None


def test_a_given_directory_is_taken_as_it_is(here: Path) -> None:
    given = SimpleNamespace(output_dir=Path("out"), type="sft")
    assert run_directory(given, Path("mine.yaml")) == here / "out"
    made(here / "out")
    assert run_directory(given, Path("mine.yaml"), resume=True) == here / "out"
    assert not (here / "latest").exists()


def test_two_runs_do_not_share_a_directory(here: Path) -> None:
    """Both chose it in the same second, before it was there."""
    make_directory(here / "run", new=True)
    with pytest.raises(RecipeError, match="another run has begun"):
        make_directory(here / "run", new=True)
    make_directory(here / "run", new=False)


def git(*words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_the_recipe(here: Path) -> None:
    assert commit(here) is None
    git("init", "-q")
    assert commit(here) is None  # nothing is committed yet
    (here / "a.yaml").write_text("a: 1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    (here / "new.yaml").write_text("")
    assert commit(here) == {"commit": head, "changed": False}
    (here / "a.yaml").write_text("a: 2\n")
    assert commit(here) == {"commit": head, "changed": True}


def test_no_program_of_the_repository_is_run(here: Path) -> None:
    """A repository may name one that `git status` starts."""
    git("init", "-q")
    git("commit", "-qm", "one", "--allow-empty")
    (here / "spy").write_text(f"#!/bin/sh\ntouch {here}/ran\n")
    (here / "spy").chmod(0o755)
    git("config", "core.fsmonitor", str(here / "spy"))
    assert commit(here) is not None
    assert not (here / "ran").exists()


def test_every_start_is_kept(here: Path) -> None:
    (here / "run").mkdir()
    first = starts(here / "run", ["ptrain", "run", "a.yaml"], here)
    write_spec(here / "run", {"recipe": {}, "starts": first}, {"seed": 42})
    second = starts(here / "run", ["ptrain", "run", "a.yaml", "--resume"], here)
    assert [start["command"][-1] for start in second] == ["a.yaml", "--resume"]
    assert second[0] == json.loads((here / "run" / "run.json").read_text())["starts"][0]
    assert set(second[1]) == {"time", "command", "git", "versions"}
    assert (here / "run" / "resolved.yaml").read_text() == "seed: 42\n"


def test_the_disk_of_an_entry_that_is_switched_off_does_not_count(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(folder: str, *, enabled: bool) -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace(enabled=enabled, output_dir=here / folder))

    def check(*, enabled: bool) -> None:
        entries = [entry("large", enabled=True), entry("full", enabled=enabled)]
        check_space(cast("Run", SimpleNamespace(parts=SimpleNamespace(checkpoints=entries))), here, 100)

    monkeypatch.setattr(directory, "free_bytes", lambda path: 0 if path.name == "full" else 10**6)
    check(enabled=False)
    with pytest.raises(CheckpointError, match="has 0 free"):
        check(enabled=True)


HOLDER = """
import os, sys, time
from pathlib import Path
from ptrain.directory import hold, sign
hold(Path(sys.argv[1]))
sign(Path(sys.argv[1]))
if os.fork() == 0:
    print("held", flush=True)
time.sleep(60)
"""


def kept_out(path: Path) -> bool:
    """Whether another process may not train there."""
    code = "import sys; from pathlib import Path; from ptrain.directory import hold; hold(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE, text=True, check=False)
    assert not done.returncode or "another process" in done.stderr, done.stderr
    return bool(done.returncode)


def test_one_process_trains_in_a_directory(tmp_path: Path) -> None:
    """Another is refused, until the first is killed, even where it leaves a child behind."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with pytest.raises(RecipeError, match=rf"another process \({holder.pid} on .*is training in"):
                directory.hold(tmp_path)
            holder.kill()
            holder.wait()
            os.killpg(holder.pid, 0)  # its child is there
            directory.hold(tmp_path)
            directory.release(tmp_path)
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_the_last_run_of_a_process_releases_its_directory(tmp_path: Path) -> None:
    """Also where somebody else of this process has read it, or it was renamed. The lock's file does not make it used."""
    directory.hold(tmp_path / "none")  # nothing to lock: nobody is kept out
    directory.release(tmp_path / "none")
    place = tmp_path / "run"
    place.mkdir()
    directory.hold(place)
    directory.hold(place)
    shutil.copytree(place, tmp_path / "copy")
    directory.release(place)
    assert kept_out(place)
    aside = directory.set_aside(place)
    assert aside.name == "run.1" and kept_out(aside)
    directory.release(aside)
    assert not kept_out(aside)
    directory.check_directory(aside, resume=False, restart=False)
