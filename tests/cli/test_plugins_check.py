"""`ptrain plugins check`: the table, JSON, keys, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def ptrain(ptrain_in: Any, tmp_path: Path) -> Any:
    """The command in an empty folder."""
    return ptrain_in(tmp_path)


def test_a_table_and_its_keys(ptrain: Any, tmp_path: Path) -> None:
    """Keys come from a file and from overrides; nothing but the table is printed, and nothing is left behind."""
    keys = tmp_path / "keys.yaml"
    keys.write_text("scheduler: {num_warmup_steps: 1, num_decay_steps: 200}\n")
    code, out, err = ptrain("plugins", "check", "wsd", "--recipe", keys, "-o", "scheduler.num_decay_steps=2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("scheduler wsd (ptrain-core ")
    assert [line.split() for line in lines[1:]] == [
        [name, "ok"] for name in ("hooks", "config", "discovery", "imports", "trains", "fields", "resume", "rates")
    ]
    assert list(tmp_path.iterdir()) == [keys]


def test_what_fails_is_exit_code_1(ptrain: Any) -> None:
    code, out, err = ptrain("plugins", "check", "wsd", "--json")
    found = {row["check"]: row for row in json.loads(out)}
    assert code == 1
    assert (
        found["config"]["state"] == "failed" and "`scheduler.num_warmup_steps` is missing" in found["config"]["reason"]
    )
    assert "give the check the keys that it needs" in found["config"]["reason"]
    assert found["trains"] == {
        "kind": "scheduler", "name": "wsd", "distribution": "ptrain-core", "version": found["hooks"]["version"],
        "check": "trains", "state": "not applicable", "reason": "the check `config` fails",
    }  # fmt: skip
    assert found["hooks"]["state"] == "ok" and "  hooks        ok" in err


def test_what_there_is_not_is_exit_code_2(ptrain: Any) -> None:
    code, out, err = ptrain("plugins", "check", "wsdd")
    assert (code, out) == (2, "")
    assert "nothing that is installed is called `wsdd`" in err and "fix: write `wsd`" in err
