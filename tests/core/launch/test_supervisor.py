"""Several workers: real processes that end, fail, hang, ignore signals and leave children behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptrain.launch.signals import NOTICE

pytestmark = pytest.mark.torch_free

Start = Callable[..., Any]
"""The fixture `supervised`: starts a supervisor whose workers run a script."""
HANG = "time.sleep(600)"


def test_all_done_is_exit_code_0(supervised: Start) -> None:
    code, out, err = supervised("print('done', rank)").finish()
    assert (code, out, err) == (0, "done 0\n", "")


def test_each_worker_knows_its_place(supervised: Start) -> None:
    run = supervised(
        """
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
        note(f"env-{rank}", " ".join(os.environ[name] for name in names))
        """,
        workers=3,
    )
    assert run.finish()[0] == 0
    places = [run.read(f"env-{rank}").split() for rank in range(3)]
    ports = {place.pop() for place in places}
    assert places == [[str(rank), "3", str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len(ports) == 1 and 1024 < int(ports.pop()) < 65536


def test_a_chosen_port_is_used(supervised: Start) -> None:
    run = supervised("note(f'port-{rank}', os.environ['MASTER_PORT'])", port=23456)
    assert run.finish()[0] == 0
    assert run.read("port-0") == run.read("port-1") == "23456"


def test_a_port_taken_in_the_meantime_means_another_start(supervised: Start) -> None:
    run = supervised(
        """
        if not (here / "tried").exists():
            wait_for("pid-1")
            if rank == 0:
                note("tried", os.environ["MASTER_PORT"])
                fail(RuntimeError("failed to listen: port 1, name: EADDRINUSE"))
                sys.exit(1)
            time.sleep(600)
        note(f"second-{rank}", os.environ["MASTER_PORT"])
        """
    )
    code, _, err = run.finish()
    assert (code, err) == (0, "")
    assert run.read("second-0") == run.read("second-1") != run.read("tried")


@pytest.mark.parametrize(("workers", "given"), [(2, None), (2, "7"), (1, None)])
def test_cpu_workers_share_the_cores(supervised: Start, workers: int, given: str | None) -> None:
    env = {"OMP_NUM_THREADS": given, "DS_ACCELERATOR": "cpu"}
    run = supervised("note(f'omp-{rank}', os.environ.get('OMP_NUM_THREADS'))", workers=workers, env=env)
    assert run.finish()[0] == 0
    found = run.read("omp-0")
    if given:
        assert found == given
    elif workers == 1:
        assert found == "None"
    else:
        assert 1 <= int(found) <= max(1, (os.cpu_count() or 1) // 2)


def test_workers_are_bound_to_cores(supervised: Start) -> None:
    core = min(os.sched_getaffinity(0))
    run = supervised(
        "time.sleep(0.3); note(f'cores-{rank}', (os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS']))",
        cores=[[core], [core]],
        env={"OMP_NUM_THREADS": None},
    )
    assert run.finish()[0] == 0
    assert run.read("cores-0") == run.read("cores-1") == f"({{{core}}}, '1')"


def test_rank_0_has_the_console_and_the_others_a_log(supervised: Start) -> None:
    run = supervised("print('out', rank); print('err', rank, file=sys.stderr)")
    assert run.finish() == (0, "out 0\n", "err 0\n")
    assert sorted(run.log(1).split("\n")) == ["", "err 1", "out 1"]
    assert not (run.folder / "logs" / "rank-0.log").exists()


def test_other_ranks_are_shown_with_their_rank(supervised: Start) -> None:
    run = supervised(r"sys.stdout.write(f'out {rank}\n')", workers=3, console="*", files=[2])
    code, out, _ = run.finish()
    assert (code, sorted(out.splitlines())) == (0, ["[rank 1] out 1", "[rank 2] out 2", "out 0"])
    assert run.log(2) == "out 2\n"
    assert not (run.folder / "logs" / "rank-1.log").exists()


def test_a_console_that_takes_nothing_stops_no_worker(supervised: Start) -> None:
    """Be it that it does not know a letter, or is gone: a worker's output is read still, and goes to its log."""
    run = supervised(
        r"""
        for number in range(20000):
            sys.stdout.buffer.write(f'line {number} of \u4e16\n'.encode()) if rank else None
        """,
        console="*",
        env={"PYTHONIOENCODING": "ascii"},
    )
    code, out, _ = run.finish()
    assert (code, out.splitlines()[-1]) == (0, "[rank 1] line 19999 of ?")
    assert run.log(1).splitlines()[-1] == "line 19999 of \u4e16"
    run = supervised("print('line\\n' * 20000) if rank else None", console="*")
    assert run.process.stdout is not None
    run.process.stdout.close()
    run.process.wait(30)
    assert run.log(1).count("line") == 40000  # the log goes on


def test_output_can_go_to_files_alone(supervised: Start) -> None:
    run = supervised("print('out', rank)", console=[])
    assert run.finish() == (0, "", "")
    assert (run.log(0), run.log(1)) == ("out 0\n", "out 1\n")


def test_the_first_exception_is_what_the_user_sees(supervised: Start) -> None:
    """Rank 1 fails; rank 0 ends earlier, only because its peer went away."""
    run = supervised(
        """
        if rank == 1:
            fail(ValueError("the cause"))
            note("failed")
            time.sleep(600)
        wait_for("failed")
        fail(RuntimeError("[gloo/transport/tcp/pair.cc:598] Connection closed by peer [127.0.0.1]:1"))
        sys.exit(1)
        """,
        grace=0.2,
    )
    code, _, err = run.finish()
    lines = err.splitlines()
    assert code == 1
    assert lines[0] == "error: rank 1: ValueError: the cause"
    assert lines[1].startswith("  at ") and lines[1].endswith("in fail")
    assert lines[2:] == [
        f"  output: {run.folder}/logs/rank-1.log",
        f"  traceback: {run.folder}/errors/rank-1.json",
    ]


def test_a_lost_peer_is_never_blamed(supervised: Start) -> None:
    """Rank 0 reports the lost connection before the supervisor can see that rank 1 was killed."""
    run = supervised(
        """
        if rank == 1:
            wait_for("ready")
            os.kill(os.getpid(), signal.SIGKILL)
        fail(RuntimeError("Connection reset by peer"))
        note("ready")
        time.sleep(600)
        """,
        grace=0.2,
    )
    code, _, err = run.finish()
    assert code == 128 + signal.SIGKILL
    assert "error: rank 1: the process was ended by SIGKILL" in err
    assert "Connection reset" not in err


def test_bad_input_found_by_a_worker_keeps_its_exit_code(supervised: Start) -> None:
    run = supervised(
        """
        from ptrain.errors import DataError
        if rank == 1:
            fail(DataError("row 7 has no text", fix="remove it"))
            sys.exit(2)
        time.sleep(600)
        """,
        grace=0.2,
    )
    assert run.finish() == (2, "", "error: rank 1: row 7 has no text\n  fix: remove it\n")


def test_an_exit_without_an_exception_shows_the_end_of_the_log(supervised: Start) -> None:
    run = supervised(
        """
        if rank == 1:
            print("terminate called in native code", flush=True)
            os._exit(3)
        time.sleep(600)
        """,
        grace=0.2,
    )
    code, _, err = run.finish()
    assert code == 3
    assert err.splitlines() == [
        "error: rank 1: the process ended with exit code 3 and left no exception",
        "  | terminate called in native code",
        f"  output: {run.folder}/logs/rank-1.log",
    ]


def test_failures_of_an_earlier_start_are_forgotten(supervised: Start) -> None:
    first = supervised("fail(ValueError('old')); sys.exit(1)", workers=1)
    assert "old" in first.finish()[2]
    second = supervised("os._exit(4)", workers=1)
    code, _, err = second.finish()
    assert code == 4 and "old" not in err


def test_debug_shows_the_traceback(supervised: Start) -> None:
    code, _, err = supervised("fail(ValueError('x')); sys.exit(1)", workers=1, debug=True).finish()
    assert code == 1
    assert (
        err.startswith("Traceback (most recent call last)") and err.rstrip().splitlines()[-2] == "error: ValueError: x"
    )


def test_a_dead_worker_stops_one_that_ignores_sigterm(supervised: Start) -> None:
    run = supervised(
        """
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            note("deaf")
            time.sleep(600)
        wait_for("deaf")
        sys.exit(9)
        """,
        grace=0.5,
    )
    started = time.monotonic()
    code, _, err = run.finish()
    assert code == 9 and "exit code 9" in err
    assert run.gone("pid-0")
    assert time.monotonic() - started < 15


CHILD = "note(f'child-{rank}', subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid);"


@pytest.mark.parametrize("end", ["os._exit(1)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_children_of_workers_end_with_them(supervised: Start, end: str) -> None:
    run = supervised(f"{CHILD} wait_for('child-0'); wait_for('child-1'); {end}")
    run.finish()
    assert run.gone("child-0", "child-1")


def test_nothing_survives_a_killed_supervisor(supervised: Start) -> None:
    run = supervised(f"{CHILD} {HANG}")
    names = ["pid-0", "pid-1", "child-0", "child-1"]
    assert run.alive(*names)
    run.process.kill()
    assert run.gone(*names, timeout=5)


def test_no_process_is_left_after_a_normal_end(supervised: Start) -> None:
    run = supervised("wait_for('go')")
    assert run.alive("pid-0", "pid-1")
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    assert len(children) == 3  # two workers, and what watches over them
    (run.folder / "go").touch()
    assert run.finish()[0] == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


OBEDIENT = """
def stop(number, frame):
    note(f"got-{rank}", number)
    sys.exit(75)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, stop)
note(f"ready-{rank}")
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_request_to_stop_is_passed_on(supervised: Start, number: int) -> None:
    run = supervised(OBEDIENT)
    run.read("ready-0"), run.read("ready-1")
    run.process.send_signal(number)
    assert run.finish() == (75, "", f"{NOTICE}\n")
    assert run.read("got-0") == run.read("got-1") == str(int(number))


def test_a_request_is_passed_on_once(supervised: Start) -> None:
    run = supervised(
        """
        got = []
        signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
        note(f"ready-{rank}")
        end = time.time() + 1
        while time.time() < end:
            time.sleep(0.05)
        note(f"count-{rank}", len(got))
        sys.exit(75)
        """
    )
    run.read("ready-0"), run.read("ready-1")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish()[0] == 75
    assert run.read("count-0") == run.read("count-1") == "1"


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_request_kills_at_once(supervised: Start, first: int, second: int) -> None:
    run = supervised(
        f"""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: note(f"got-{{rank}}"))
        {CHILD} note(f"ready-{{rank}}")
        while True: time.sleep(1)
        """
    )
    run.read("ready-0"), run.read("ready-1")
    run.process.send_signal(first)
    run.read("got-0"), run.read("got-1")
    run.process.send_signal(second)
    started = time.monotonic()
    assert run.finish()[:1] == (128 + second,)
    assert time.monotonic() - started < 5
    assert run.gone("pid-0", "pid-1", "child-0", "child-1")


def test_a_request_before_workers_listen_ends_them_quietly(supervised: Start) -> None:
    run = supervised(HANG)
    run.read("pid-0"), run.read("pid-1")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == (128 + signal.SIGTERM, "", f"{NOTICE}\n")


def test_one_worker_that_stops_on_request_is_no_failure(supervised: Start) -> None:
    """A batch system may signal one worker; they agree among themselves, and end a little apart."""
    run = supervised("time.sleep(0.5 * rank); sys.exit(75)")
    assert run.finish() == (75, "", "")


def test_done_after_a_request_is_done(supervised: Start) -> None:
    run = supervised("signal.signal(signal.SIGTERM, lambda *_: note('got')); note(f'ready-{rank}'); wait_for('got')")
    run.read("ready-0"), run.read("ready-1")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish()[0] == 0


def test_the_supervisor_notices_a_death_quickly(supervised: Start) -> None:
    run = supervised(HANG)
    pid = run.pid("pid-1")
    run.read("pid-0")
    started = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert run.finish()[0] == 137
    assert time.monotonic() - started < 3


def test_a_worker_that_cannot_start_is_reported(supervised: Start) -> None:
    code, _, err = supervised("import not_there", workers=1, console=[]).finish()
    assert code == 1
    assert "  | ModuleNotFoundError: No module named 'not_there'" in err
