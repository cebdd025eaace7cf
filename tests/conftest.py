"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# What tests import stays, and looking through it for garbage again and again is a quarter of the time.
gc.set_threshold(100_000, 50, 100)

# A deadline would fail tests on a machine that is busy with something else.
settings.register_profile("ptrain", deadline=None)
settings.load_profile("ptrain")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[Path, str], Path]]:
    """Mounts a small file system of its own on a folder, or changes the options of one that it has mounted."""
    mounted: list[Path] = []

    def do(folder: Path, options: str) -> Path:
        if sys.platform != "linux" or not shutil.which("mount"):
            pytest.skip("there is no `mount` with tmpfs here")
        folder.mkdir(exist_ok=True)
        again = folder in mounted
        command = ["mount", "-t", "tmpfs", "-o", f"remount,{options}" if again else options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
        if not again:
            mounted.append(folder)
        return folder

    yield do
    # One may have been renamed along with its parent.
    targets = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()] if mounted else []
    for target in targets:
        if target.startswith(f"{tmp_path}/"):
            subprocess.run(["umount", target], check=True)
