"""`jsonl`: the metrics of each step as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ptrain.directory import set_aside
from ptrain.parts import Tracker
from ptrain.recipe.env import value_of
from ptrain.recipe.sections import TrackerConfig

if TYPE_CHECKING:
    from ptrain.run import Run


class JsonLines(Tracker):
    """One object a step and one an evaluation; after a resume, lines past the checkpoint are cut off."""

    class Config(TrackerConfig):
        """Keys of `jsonl`."""

        path: Path | None = None
        """The file; by default `train_log_metrics_path`, or `metrics.jsonl` in the run directory."""

    _path = Path()
    _file: TextIO | None = None
    _again: int | None = None
    """The step whose evaluation, if there is one in the file, is made again."""

    def start(self, run: Run) -> None:
        """Open the file and drop what lies past the step that the run goes on from.

        One that is not in the run directory may hold the lines of another run: it is renamed when this one begins.
        """
        given = value_of(run.recipe.train_log_metrics_path, "train_log_metrics_path")
        path = self._path = self.config.path or given or run.dir / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and not run.progress.step and run.dir not in path.absolute().parents:
            run.say(f"`{path}` holds metrics already, and is now called `{set_aside(path).name}`")
        if path.is_file():
            keep(path, lambda line: line["step"] <= run.progress.step)
        self._again = run.progress.step if run.progress.evaluated < run.progress.step else None
        self._file = path.open("a", encoding="utf-8")

    def log(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Append one line and flush it, so that nothing is lost when the run is killed."""
        if self._file is not None and _evaluates(metrics) and metrics["step"] == self._again:
            # The last one is made after the last checkpoint, and again where a run that was done is resumed.
            self._file.close()
            keep(self._path, lambda line: line["step"] != self._again or not _evaluates(line))
            self._file, self._again = self._path.open("a", encoding="utf-8"), None
        if self._file is None:
            return
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def finish(self, run: Run) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def keep(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop the lines of `path` that are not wanted, or broken."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is(line, wanted)]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _is(line: str, wanted: Callable[[Mapping[str, Any]], bool]) -> bool:
    try:
        return wanted(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return False


def _evaluates(line: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in line)
