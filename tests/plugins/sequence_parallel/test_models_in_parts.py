"""Models whose sequences are cut up over workers compute what they compute of the whole, in fp64."""

from __future__ import annotations

from pathlib import Path

import sequence_workers

from ptrain.testing.workers import run_workers


def test_exchange_and_models(tmp_path: Path) -> None:
    """Values and gradients to 1e-8 on 2 and 4 workers: attention alone, sums over segments, and models of all kinds.

    Of flex attention, which has no gradient on a CPU, values alone.
    """
    work = sequence_workers.together
    run_workers(work, sequence_workers.check_all, log=tmp_path / "log", workers=4)
