"""One worker that trains many prepared runs one after another, because starting a worker takes time.

RANK, WORLD_SIZE and the like come from the environment, as for any worker. Each run directory gets
`outcome.json`, and from each rank the digests of the token ids of every step; its losses are in its own
`metrics.jsonl`. A file `cut.json` beside the run's own says when it is to end.
"""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

from ptrain import loop
from ptrain.job import open_spec


class Killed(BaseException):
    """The run ends here with whatever is on disk."""


class Cut:
    """Asked by the loop, as the signals of a real command are, whether to stop: after `step`, or within its evaluation.

    With `kill`, the run is left where it is instead.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / "cut.json"
        wanted = json.loads(file.read_text()) if file.exists() else {"step": -1}
        self.step, self.kill = wanted["step"], wanted.get("kill", False)
        self.evaluating = wanted.get("evaluating", False)
        self.run: Any = None

    @property
    def requested(self) -> bool:
        """Whether the moment has come."""
        now = self.run.progress.step == self.step and self.run.model.training != self.evaluating
        if now and self.kill:
            raise Killed
        return now


def record_ids(run: Any) -> None:
    """Write down what each step is given."""
    call, file = run.stack.call, run.dir / f"ids-{run.rank}.jsonl"

    def recorded(stage: str, **arguments: Any) -> Any:
        if stage == "step":
            ids = [batch["input_ids"].numpy().tobytes() for batch in arguments["batches"]]
            digest = hashlib.sha256(b"|".join(ids)).hexdigest()
            rows = [number for batch in arguments["batches"] for number in batch["row_numbers"]]
            with file.open("a") as out:
                out.write(json.dumps({"step": run.progress.step + 1, "ids": digest, "rows": rows}) + "\n")
        return call(stage, **arguments)

    run.stack.call = recorded


def main(specs: list[str]) -> None:
    """Train each."""
    for spec in map(Path, specs):
        cut = Cut(spec.parent)
        run = cut.run = open_spec(spec, cut)
        record_ids(run)
        try:
            outcome = loop.train(run)
        except Killed:
            outcome = "killed"
        run.trackers.finish(run)
        if run.rank == 0:
            done = {"outcome": outcome, "step": run.progress.step, "lr": run.scheduler.get_last_lr()}
            (spec.parent / "outcome.json").write_text(json.dumps(done))
        del run, cut
        gc.collect()
