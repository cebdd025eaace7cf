"""Runs in which a plugin's own code fails, at one stage after the other."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from ptrain.testing import runs
from ptrain.testing.recipes import merged

FILE = "faults.json"
PLANTED = "planted by the check `errors`"
CHANGES: dict[str, Any] = {
    "micro_batch_size": 2, "gradient_accumulation_steps": 2, "exit_iteration": 2, "eval_at_start": True,
    "checkpoint": [],
}  # fmt: skip
"""Every stage comes about in two steps; a run that is cut off saves its state."""


class Planted(RuntimeError):
    """What the plugin's code raises."""


@dataclass
class Fault:
    """Makes code fail where it calls something in Python, or at its last line where it calls nothing.

    Attributes:
        target: the code.
        fired: whether it has failed.
    """

    target: CodeType
    fired: bool = False
    _line: int = 0
    _last: int = 0

    def __enter__(self) -> Fault:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.fired:
            return None
        if frame.f_code is self.target:
            return self._inside
        caller = frame.f_back
        if caller is not None and caller.f_code is self.target and "importlib" not in frame.f_code.co_filename:
            self._fail()
        return None

    def _inside(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.fired:
            return None
        if event == "return":
            self._last = self._line
        elif event == "line":
            self._line = frame.f_lineno
            if self._line == self._last:
                self._fail()
        return self._inside

    def _fail(self) -> None:
        self.fired = True
        raise Planted(PLANTED)


class Heard(logging.Handler):
    """Collects what is warned about."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.messages.append(record.getMessage())


def faults(recipe: Mapping[str, Any], folder: Path, kind: str, name: str) -> None:
    """Let each stage and callback of a plugin fail in a run of its own, and write to `FILE` what came of it.

    By stage: the error that came out, as `[its class, its text]`, or the warnings where none did. A stage that the run
    does not come to is missing.
    """
    from ptrain.catalog import Catalog

    catalog, found = Catalog.installed(), {}
    for stage, target in targets(catalog.load(catalog.find(kind, name))):
        own = folder / stage
        changes = merged(CHANGES, {"data": {"cache_dir": str(own / "cache")}})
        told = _told(merged(recipe, changes), own / "run", Fault(target))
        if told is not None:
            found[stage] = told
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps(found), encoding="utf-8")


def targets(cls: Any) -> Iterator[tuple[str, CodeType]]:
    """The code of every stage and callback of a plugin."""
    from ptrain.layer import STAGES

    answers = [(stage, getattr(cls, stage)) for stage in STAGES if hasattr(getattr(cls, stage, None), "ptrain_impl")]
    for name, function in [*answers, *cls.callbacks]:
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is not None:
            yield name, code


def _told(recipe: Mapping[str, Any], folder: Path, fault: Fault) -> Any:
    from ptrain import loop
    from ptrain.job import open_spec

    heard = Heard()
    logging.getLogger("ptrain").addHandler(heard)
    try:
        with fault:
            run = open_spec(runs.prepare(recipe, folder))
            loop.train(run)
    except Exception as error:
        if not fault.fired:
            raise
        return [type(error).__name__, str(error)]
    finally:
        logging.getLogger("ptrain").removeHandler(heard)
    return heard.messages if fault.fired else None
