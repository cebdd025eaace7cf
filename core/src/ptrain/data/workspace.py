"""Where preparation keeps its temporary files and counts: one workspace for each preparation."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from ptrain.data.report import Report
from ptrain.errors import DataError


@dataclass
class Workspace:
    """One preparation on its way.

    Attributes:
        folder: for temporary files; on the disk of the cache. Arrow files there are mapped, not loaded.
        num_proc: processes that may be used.
        reports: what was counted, by split.
        broken: where an audit collects the rows that can't be read; otherwise the first of them is an error.
    """

    folder: Path
    num_proc: int = 1
    reports: dict[str, Report] = field(default_factory=dict)
    broken: list[DataError] | None = None
    _number: int = 0

    def report(self, split: str) -> Report:
        """The counts of a split."""
        return self.reports.setdefault(split, Report())

    def path(self, name: str) -> Path:
        """A new file for `name`: the same one each time that a preparation is begun again."""
        self._number += 1
        return self.folder / f"{self._number:03d}-{name}"


_current: ContextVar[Workspace | None] = ContextVar("ptrain_workspace", default=None)


def workspace() -> Workspace:
    """The workspace of this preparation; outside of one, a temporary one that lasts as long as the process."""
    found = _current.get()
    if found is None:
        folder = Path(tempfile.mkdtemp(prefix="ptrain-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        found = Workspace(folder)
        _current.set(found)
    return found


@contextmanager
def using(space: Workspace) -> Iterator[Workspace]:
    """Within it, `workspace()` is `space`."""
    token = _current.set(space)
    try:
        yield space
    finally:
        _current.reset(token)
