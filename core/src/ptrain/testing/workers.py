"""Real workers for tests: each is a process of its own, forked from one that has imported torch and DeepSpeed already.

Importing them takes longer than a tiny run; so it happens once, and no process trains more than one run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain import errors
from ptrain.errors import PtrainError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

PRELOAD = [
    "__main__", "datasets", "deepspeed", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "ptrain.checkpoint.huggingface", "ptrain.checkpoint.resumable",
    "ptrain.checks", "ptrain.data.cache", "ptrain.data.sources.local", "ptrain.data.tokenizers", "ptrain.engine",
    "ptrain.evaluators", "ptrain.job", "ptrain.loaders", "ptrain.loop", "ptrain.model.apart",
    "ptrain.model.huggingface", "ptrain.model.varlen", "ptrain.optimizers", "ptrain.schedulers", "ptrain.setup",
    "ptrain.testing.jobs",
]  # fmt: skip
"""What every worker needs. What is not listed is imported by each worker, plugins above all."""
QUIET = {
    "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
    "TORCH_COMPILE_DISABLE": "1", "DS_LOG_LEVEL": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Its other allocator has a thread, and a process is to be forked.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}  # fmt: skip
"""The environment of workers: on CPU, one thread each, nothing compiled, no network."""
TIMEOUT = 300.0


class WorkerFailed(PtrainError):
    """A worker ended with an error, or did not end.

    Attributes:
        output: what the worker that failed wrote; its end is in the message where the error is none of ptrain's.
    """

    def __init__(self, message: str, output: str) -> None:
        known = isinstance(getattr(errors, message.partition(":")[0], None), type)
        super().__init__(message if known else f"{message}\n{output[-2000:]}")
        self.output = output


def run_workers(
    work: Callable[..., Any], *arguments: Any, log: Path, workers: int = 1, timeout: float = TIMEOUT
) -> str:
    """Call `work(*arguments)` in so many new processes, which form one group; return what rank 0 wrote.

    Args:
        work: a function of a module.
        log: the file for what rank 0 writes; the other ranks' lie beside it.

    Raises:
        WorkerFailed: one of them did.
    """
    from ptrain.engine import free_port

    context = multiprocessing.get_context("forkserver")
    _start_server()
    group = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [log.with_name(f"{log.name}.{rank}" if rank else log.name) for rank in range(workers)]
    environment = {**{name: value for name, value in os.environ.items() if name not in QUIET}, **QUIET, **group}
    processes = []
    for rank, file in enumerate(logs):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(context.Process(target=_in_worker, args=(own, file, work, arguments)))
        processes[-1].start()
    _wait(processes, logs, timeout)
    return _all(log)


def _wait(processes: list[ForkServerProcess], logs: list[Path], timeout: float) -> None:
    from multiprocessing.connection import wait

    running = {process.sentinel: process for process in processes}
    try:
        while running:
            ended = wait(list(running), timeout)
            if not ended:
                raise WorkerFailed(f"a worker did not end within {timeout:.0f} s", _all(logs[0]))
            for sentinel in ended:
                running.pop(sentinel).join()  # type: ignore[call-overload]
            if any(process.exitcode for process in processes):
                wait(list(running), SETTLE)
                raise _failure(processes, logs)
    finally:
        # The others wait for one that is gone.
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


SETTLE = 0.5
"""Seconds in which a worker ends that was left by another one: the failure of that one is the cause."""


def _failure(processes: list[ForkServerProcess], logs: list[Path]) -> WorkerFailed:
    """The failure of the worker that wrote its last line first."""
    failed = [
        (log.stat().st_mtime_ns, log, one.exitcode) for one, log in zip(processes, logs, strict=True) if one.exitcode
    ]
    _, log, code = min(failed)
    return WorkerFailed(_last_error(log, code), _all(log))


def _start_server() -> None:
    """Start the process that others are forked from; it ends with this one."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    with _environment({**os.environ, **QUIET}), _silence():
        forkserver.ensure_running()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What is started within it writes no errors: libraries remark on what they do not find when they are imported."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _in_worker(environment: Mapping[str, str], log: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """What a new worker does: `work`, with everything that is written going to `log`."""
    from ptrain.launch import guard

    guard.die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 0
    try:
        work(*arguments)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.write(f"\n{ERROR}{_described(error)}\n")
        code = 1
    sys.exit(code)


ERROR = "failed with "
"""What the last line of the output of a worker that failed begins with."""


def _described(error: BaseException) -> str:
    if isinstance(error, PtrainError):
        return f"{type(error).__name__}: {error}".replace("\n", ";")
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _last_error(log: Path, code: int) -> str:
    last = next((line for line in reversed(_all(log).splitlines()) if line.startswith(ERROR)), "")
    return last.removeprefix(ERROR) or f"a worker ended with exit code {code}"


def _all(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")
