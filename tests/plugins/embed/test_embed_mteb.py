"""An encoder as mteb asks it, where that is installed: a task whose data is made here gives what we measure ourselves."""

from __future__ import annotations

from pathlib import Path

import embed_mined
import pytest

from ptrain.testing.workers import run_workers


def test_a_task_of_mteb(tmp_path: Path) -> None:
    pytest.importorskip("mteb", reason="mteb is not installed")
    run_workers(embed_mined.by_mteb, tmp_path, log=tmp_path / "log")
