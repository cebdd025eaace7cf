"""One worker that trains many prepared runs one after another, because starting a worker costs seconds.

    python many_runs.py run.json run.json ...

RANK, WORLD_SIZE and the like come from the environment, as for any worker. Each run directory gets
`outcome.json`; its losses are in its own `metrics.jsonl`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path

from ptrain import loop
from ptrain.train import open_run


def main(specs: list[str]) -> int:
    """Train each; 0 when all went through."""
    for spec in map(Path, specs):
        run = open_run(spec)
        outcome = loop.train(run)
        run.trackers.finish(run)
        if run.rank == 0:
            done = {"outcome": outcome, "step": run.progress.step, "lr": run.scheduler.get_last_lr()}
            (spec.parent / "outcome.json").write_text(json.dumps(done))
        del run
        gc.collect()
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Tearing the interpreter down after DeepSpeed takes a second.
    os._exit(code)
