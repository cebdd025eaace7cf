"""Why workers failed: left in files, told apart, shown."""

from __future__ import annotations

import io
import signal
from pathlib import Path
from typing import Any

import pytest

from ptrain.errors import PluginError, RecipeError, TrainingError
from ptrain.launch import failure
from ptrain.launch.failure import Failure
from ptrain.launch.report import show, show_failure

pytestmark = pytest.mark.torch_free


def failed(error: Exception, rank: int = 0) -> Failure:
    """The failure that raising `error` leaves."""
    try:
        raise error
    except Exception as raised:
        return Failure.of(raised, rank)


def test_a_failure_survives_its_file(tmp_path: Path) -> None:
    left = failed(ValueError("bad\nvalue \N{SNOWMAN}"), rank=3)
    assert left.write(tmp_path / "errors") == tmp_path / "errors" / "rank-3.json"
    assert failure.read(tmp_path / "errors") == [left]
    assert left.place == f"{__file__}:{left.place.split(':')[1].split(',')[0]}, in failed"
    assert left.traceback[0].startswith("Traceback") and left.traceback[-1] == "value \N{SNOWMAN}"
    failure.clear(tmp_path / "errors")
    assert failure.read(tmp_path / "errors") == []


def test_files_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").write_text("{")
    (tmp_path / "rank-1.json").write_text('{"rank": 1, "unknown": 2}')
    (tmp_path / "rank-2.json").mkdir()
    kept = failed(ValueError("x"), rank=4)
    kept.write(tmp_path)
    assert failure.read(tmp_path) == [kept]


def test_errors_of_ptrain_keep_exit_code_and_problems() -> None:
    assert failed(TrainingError("the loss is nan")).exit_code == 1
    bad = failed(RecipeError("unknown key", fix="write `lr`"))
    assert (bad.exit_code, bad.problems) == (2, ("unknown key\n  fix: write `lr`",))


@pytest.mark.parametrize(
    ("code", "message", "exit_code"),
    [
        (3, "the process ended with exit code 3 and left no exception", 3),
        (-signal.SIGKILL, "the process was ended by SIGKILL (out of memory?)", 137),
        (-signal.SIGSEGV, "the process was ended by SIGSEGV (a crash in native code)", 139),
        (-63, "the process was ended by signal 63", 191),
    ],
)
def test_exits_without_an_exception(code: int, message: str, exit_code: int) -> None:
    made = Failure.of_exit(code, 1)
    assert (made.message, made.exit_code) == (message, exit_code)


NOISE = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:21347",
    "[../gloo/transport/tcp/pair.cc:598] Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted on rank 1.",
    "[1] is setting up NCCL communicator: ncclRemoteError: remote process exited or there was a network error",
    "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv: wait timeout",
]


@pytest.mark.parametrize("message", NOISE)
def test_a_lost_peer_is_told_from_a_cause(message: str) -> None:
    assert failed(RuntimeError(message)).lost_peer
    earlier, later = failed(RuntimeError(message)), failed(ValueError("the cause"), 1)
    assert failure.first([earlier, later]) is later
    assert failure.first([earlier]) is earlier


@pytest.mark.parametrize("message", NOISE)
def test_a_lost_peer_is_seen_through_an_error_of_ptrain(message: str) -> None:
    try:
        raise PluginError("`step` of `user code` failed") from RuntimeError(message)
    except PluginError as error:
        made = Failure.of(error, 0)
    assert made.lost_peer and made.unexpected


def test_otherwise_the_earliest_counts() -> None:
    first, second = failed(ValueError("1")), failed(ValueError("2"), 1)
    assert failure.first([second, first]) is first
    assert not first.lost_peer and not failed(TrainingError("connection closed by the user")).lost_peer


def test_every_problem_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    both = RecipeError("one")
    both.problems = [*both.problems, *RecipeError("two", expected="three").problems]
    show_failure(failed(both), ranks=False)
    assert capsys.readouterr().err == "error: one\nerror: two\n  expected: three\n"


def test_the_traceback_is_named_where_it_tells_more(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show_failure(failed(RecipeError("one")), ranks=False, traceback=tmp_path)
    try:
        raise PluginError("a hook failed") from ValueError("x")
    except PluginError as error:
        show_failure(Failure.of(error, 1), traceback=tmp_path)
    assert capsys.readouterr().err == f"error: one\nerror: rank 1: a hook failed\n  traceback: {tmp_path}\n"


def test_a_whole_failure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = failed(ValueError("x"), 2)
    show_failure(made, traceback=tmp_path / "rank-2.json", log=tmp_path / "rank-2.log")
    assert capsys.readouterr().err.splitlines() == [
        "error: rank 2: ValueError: x",
        f"  at {made.place}",
        f"  output: {tmp_path}/rank-2.log",
        f"  traceback: {tmp_path}/rank-2.json",
    ]


def test_a_folder_that_takes_nothing_is_passed_over(mount: Any, tmp_path: Path) -> None:
    """The failure may be that its disk is full; nothing half-written stays there."""
    full, spare = mount(tmp_path / "full", "size=4k"), tmp_path / "spare"
    (full / "filler").write_bytes(bytes(4096))
    made = failed(ValueError("x" * 9000), 2)
    made.leave([full, spare])
    assert failure.read(spare) == [made]
    assert [path.name for path in full.iterdir()] == ["filler"]


class Terminal(io.StringIO):
    """Text that claims to go to a terminal."""

    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_and_not_against_the_users_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pipe, plain = Terminal(), io.StringIO(), Terminal()
    show("error", "x", terminal)
    show("error", "x", pipe)
    monkeypatch.setenv("NO_COLOR", "1")
    show("error", "x", plain)
    assert terminal.getvalue() == "\033[31;1merror\033[0m: x\n"
    assert pipe.getvalue() == plain.getvalue() == "error: x\n"
