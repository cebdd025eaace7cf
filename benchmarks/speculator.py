"""Training steps of a speculator beside the same loss as one would write it down: every logit of every head, whole.

    python benchmarks/speculator.py [--data FILE]

Both cases are runs of the trainer `spec-decode`, on the same packed rows with the same base; the second one replaces
its loss by heads at every position, whose logits are stacked, and one cross-entropy a head.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import inputs
import step

SETTING: dict[str, Any] = {
    "model": {**inputs.TINY, "vocab_size": 16_384}, "length": 512, "packed": True, "batch": 8, "steps": 3
}  # fmt: skip
SPECULATOR = {"speculator_width": 256, "speculator_tie_weights": True, "speculator_scale_input": True}
"""Three heads."""
PLAIN = step.recipe


def recipe(setting: Mapping[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """That of `step.py` with a speculator beside the model, which is not trained."""
    made = PLAIN(setting, options, folder)
    return {**made, "type": "spec-decode", "model": {**made["model"], **SPECULATOR}}


def ours(options: argparse.Namespace) -> Mapping[str, float]:
    """As it is."""
    step.recipe = recipe
    return step.ptrain(SETTING, options)


def naive(options: argparse.Namespace) -> Mapping[str, float]:
    """With all logits."""
    from ptrain_spec_decode import losses

    losses.heads_loss = all_logits
    return ours(options)


def all_logits(run: Any, hidden: Any, batch: Any, *, measure: bool) -> Any:
    """The same sums, from the logits of every head at every position."""
    import torch
    from torch.nn.functional import cross_entropy

    import ptrain
    from ptrain_spec_decode.losses import states, term
    from ptrain_spec_decode.targets import LABELS, TOKENS

    speculator = run.model.speculator
    drafted = enumerate(states(speculator, hidden, batch[TOKENS]))
    logits = torch.stack([speculator.head(i)(state) for i, state in drafted])
    return ptrain.Loss(
        {
            term(i): cross_entropy(own.flatten(0, 1).float(), batch[LABELS][..., i].flatten(), reduction="sum")
            for i, own in enumerate(logits)
        }
    )


def add(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--data", type=Path, help="a file of conversations; by default they are generated")
    parser.set_defaults(rounds=3)


CASES: dict[str, harness.Case] = {"ptrain": ours, "all logits": naive}
RATIOS = {
    "time per step, all logits to ptrain": harness.Ratio("all logits.ms", "ptrain.ms", "more", 1.5),
    "memory, all logits to ptrain": harness.Ratio("all logits.MiB", "ptrain.MiB", "more", 2.0),
}

if __name__ == "__main__":
    sys.exit(harness.main("speculator", CASES, RATIOS, add))
