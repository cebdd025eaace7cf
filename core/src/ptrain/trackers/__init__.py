"""Trackers: where metrics go. One that fails is reported once and left out; it never stops a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptrain.parts import Tracker

if TYPE_CHECKING:
    from ptrain.run import Run


class Trackers:
    """All trackers of a run, on rank 0; on other workers none."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._active = list(trackers)
        self.last: dict[str, Any] = {}

    def start(self, run: Run) -> None:
        """Called once before the first step."""
        self._each(run, lambda tracker: tracker.start(run))

    def log(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Record `metrics`; the last value of each stays in `last`, also on workers without trackers."""
        self.last.update(metrics)
        self._each(run, lambda tracker: tracker.log(run, metrics))

    def finish(self, run: Run) -> None:
        """Called once at the end."""
        self._each(run, lambda tracker: tracker.finish(run))

    def _each(self, run: Run, call: Any) -> None:
        for tracker in list(self._active):
            try:
                call(tracker)
            except Exception as error:
                self._active.remove(tracker)
                run.warn(f"the tracker `{type(tracker).__name__}` failed ({error}); the run goes on without it")
