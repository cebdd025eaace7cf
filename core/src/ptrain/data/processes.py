"""Work for several processes of `ptrain.data.worker`, answered in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from ptrain import errors


class _Process:
    """One process and the way to ask it."""

    def __init__(self, task: Mapping[str, Any], threads: int) -> None:
        env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ptrain.data.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True, encoding="utf-8",
        )  # fmt: skip
        self._write(task)

    def _write(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def ask(self, number: int) -> str:
        """The file of a shard.

        Raises:
            PtrainError: what is wrong with it, or that the process died.
        """
        assert self._process.stdout is not None
        try:
            self._write(number)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise errors.PtrainError(
                f"a process that prepares data died with exit code {self._process.wait()}",
                fix="see its message above; if it was short of memory, lower `data.num_proc`",
            )
        answer = json.loads(line)
        if "file" not in answer:
            where = errors.Position(*answer["where"]) if answer["where"] else None
            kind = getattr(errors, answer["error"])
            raise kind(answer["message"], where=where, expected=answer["expected"], fix=answer["fix"])
        return answer["file"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with suppress(BrokenPipeError), self._process:
            pass


def in_processes(task: Mapping[str, Any], numbers: Iterable[int], processes: int) -> Iterator[str]:
    """The files of the shards with these numbers, in order, made by so many processes.

    Raises:
        PtrainError: of the first shard that is wrong.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    workers = [_Process(task, threads) for _ in range(processes)]
    idle: SimpleQueue[_Process] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def ask(number: int) -> str:
        worker = idle.get()
        try:
            return worker.ask(number)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(processes)
    try:
        waiting: list[Future[str]] = [pool.submit(ask, number) for number in numbers]
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()
