"""A process that encodes shards: `python -m ptrain.data.worker`.

It reads a task and then numbers of shards from stdin, one JSON value a line, and answers each number with the file
that it made, or with what is wrong. Plain files go in and out: nothing is pickled, and the user's own script is
not run again as `multiprocessing` would.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from ptrain import garbage
from ptrain.errors import PtrainError


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    shards: Any = None
    task = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        try:
            if shards is None:
                garbage.look_seldom()
                shards = _shards(task)
                garbage.look_as_usual()
            _answer(answers, file=str(shards.make(json.loads(line))))
        except PtrainError as error:
            problem = error.problems[0]
            where = [problem.where.file, problem.where.line, problem.where.column] if problem.where else None
            _answer(
                answers, error=type(error).__name__, message=problem.message, where=where, expected=problem.expected,
                fix=problem.fix,
            )  # fmt: skip


def _shards(task: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    from ptrain.data.arrow import open_arrow
    from ptrain.data.process import Job, Work
    from ptrain.data.shards import Shards

    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"])
    return Shards(open_arrow(Path(task["rows"])), Work(tokenizer, Job(**task["job"])), Path(task["folder"]))


def _answer(answers: TextIO, **content: Any) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
