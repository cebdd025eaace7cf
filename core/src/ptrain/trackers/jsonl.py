"""`jsonl`: the metrics of each step as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ptrain.directory import set_aside
from ptrain.parts import Tracker
from ptrain.recipe.env import value_of
from ptrain.recipe.sections import TrackerConfig

if TYPE_CHECKING:
    from ptrain.results import Progress
    from ptrain.run import Run


class JsonLines(Tracker):
    """One object a step and one an evaluation; after a resume, lines past the checkpoint are cut off."""

    class Config(TrackerConfig):
        """Keys of `jsonl`."""

        path: Path | None = None
        """The file; by default `train_log_metrics_path`, or `metrics.jsonl` in the run directory."""

    _file: TextIO | None = None

    def start(self, run: Run) -> None:
        """Open the file and drop what lies past the step that the run goes on from.

        One that is not in the run directory may hold the lines of another run: it is renamed when this one begins.
        """
        given = value_of(run.recipe.train_log_metrics_path, "train_log_metrics_path")
        path = self.config.path or given or run.dir / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not run.progress.step and run.dir not in path.absolute().parents:
            run.say(f"`{path}` is of an earlier run, and now called `{set_aside(path).name}`")
        if path.exists():
            rewind(path, run.progress)
        self._file = path.open("a", encoding="utf-8")

    def log(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Append one line and flush it, so that nothing is lost when the run is killed."""
        if self._file is not None:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()

    def finish(self, run: Run) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def rewind(path: Path, progress: Progress) -> None:
    """Drop the lines of `path` that are of later steps and evaluations than those done, or broken."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _done(line, progress)]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _done(line: str, progress: Progress) -> bool:
    try:
        found = json.loads(line)
        # The one at the end is made after the last checkpoint, and again where a run that was done is resumed.
        evaluates = any(name.startswith("eval/") for name in found)
        return found["step"] <= (progress.evaluated if evaluates else progress.step)
    except (ValueError, KeyError, TypeError):
        return False
