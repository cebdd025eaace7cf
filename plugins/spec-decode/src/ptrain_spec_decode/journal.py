"""The journal of a long generation: every answer is written down when it comes, so that nothing is asked for twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ptrain import DataError
from ptrain_spec_decode.engines import Answer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Journal:
    """JSON lines that are only ever added to; the first one holds the settings of the call.

    Attributes:
        path: the file.
        failed: the reason by key of requests whose last answer was none.
        used: tokens that all answers together say they took.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open the journal, or begin one.

        Raises:
            DataError: it is damaged, belongs to another call, or another process is writing it.
        """
        self.path = path
        self.failed: dict[str, str] = {}
        self.used = 0
        self._places: dict[str, int] = {}
        self._file: IO[bytes] = path.open("a+b")
        self._lock()
        lines = self._lines()
        head = next(lines, None)
        if head is None:
            self._write({"settings": dict(settings)})
            return
        self._check(head[1], settings)
        for place, line in lines:
            self._note(place, line)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, answer: Answer) -> None:
        """Write an answer down; once this returns, only the failure of the machine itself can lose it."""
        if answer.failed:
            line: dict[str, Any] = {"key": answer.key, "failed": answer.failed}
        else:
            line = {"key": answer.key, "tokens": answer.tokens, "used": answer.used}
        self._note(self._write(line), line)

    def tokens(self, key: str) -> list[int]:
        """What was written for a request that was answered."""
        self._file.seek(self._places[key])
        return json.loads(self._file.readline())["tokens"]

    def close(self) -> None:
        """Let go of the file, which goes too where no answer was ever written to it."""
        if not self._places and not self.failed:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> int:
        self._file.seek(0, 2)
        place = self._file.tell()
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        return place

    def _note(self, place: int, line: Mapping[str, Any]) -> None:
        key = line["key"]
        if "failed" in line:
            self.failed[key] = line["failed"]
            return
        self.failed.pop(key, None)
        self._places[key] = place
        self.used += line.get("used", 0)

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Place and content of each line; a last one that was not written whole is cut off."""
        self._file.seek(0)
        place = 0
        for number, raw in enumerate(iter(self._file.readline, b""), 1):
            line = _parsed(raw)
            if line is None:
                if self._file.read(1):
                    raise DataError(f"line {number} of the journal `{self.path}` is damaged", fix="delete that line")
                self._file.truncate(place)
                return
            yield place, line
            place += len(raw)
            self._file.seek(place)

    def _check(self, head: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        before = head.get("settings")
        if not isinstance(before, dict):
            raise DataError(f"`{self.path}` is no journal of a generation", fix="write to another file")
        wanted = json.loads(json.dumps(settings))
        for name in wanted:
            if before.get(name) != wanted[name]:
                raise DataError(
                    f"`{self.path}` holds answers that were made with other settings: `{name}` was "
                    f"{before.get(name)!r}, and is {wanted[name]!r} now",
                    fix="write to another file, or delete the journal to begin anew",
                )

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is writing to `{self.path}`", fix="wait for its end") from error


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """The object of a whole line, else None."""
    if not raw.endswith(b"\n"):
        return None
    with contextlib.suppress(ValueError):
        found = json.loads(raw)
        if isinstance(found, dict):
            return found
    return None
