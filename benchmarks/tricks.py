"""What each thing that makes a step faster gains: the packed steps of 512 tokens with and without it.

    python benchmarks/tricks.py [--data FILE]

Each case replaces one function of ptrain in its own process by the plain way of doing the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import harness
import step

SETTING = step.SETTINGS["packed512"]


def everything(options: argparse.Namespace) -> Mapping[str, float]:
    """As it is."""
    return step.ptrain(SETTING, options)


def block_mask(options: argparse.Namespace) -> Mapping[str, float]:
    """Attention of whole rows with transformers' mask, instead of attention within each document."""
    from ptrain.model import attention

    attention.implementation = lambda config, wanted: wanted
    return everything(options)


def all_logits(options: argparse.Namespace) -> Mapping[str, float]:
    """Logits of every token, instead of those with a label alone."""
    from ptrain.model import logprobs, nll

    nll.token_nll = lambda head, hidden, labels, rows: (
        -(logprobs.token_logprobs(head, hidden, labels.clamp(min=0), rows) * (labels != logprobs.IGNORED)).sum()
    )
    return everything(options)


def cross_entropy(options: argparse.Namespace) -> Mapping[str, float]:
    """torch's cross-entropy at the labels, instead of a gradient made in the forward pass."""
    from torch.nn import functional

    from ptrain.model import logprobs, nll

    nll.token_nll = lambda head, hidden, labels, rows: functional.cross_entropy(
        head(hidden[labels != logprobs.IGNORED]), labels[labels != logprobs.IGNORED], reduction="sum"
    )
    return everything(options)


def add(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--data", type=Path, help="a file of conversations; by default they are generated")


CASES: dict[str, harness.Case] = {
    "everything": everything,
    "block mask": block_mask,
    "all logits": all_logits,
    "cross entropy": cross_entropy,
}
RATIOS = {
    f"{case} instead, {what}": harness.Ratio(f"{case}.{number}", f"everything.{number}", "more")
    for case in list(CASES)[1:]
    for what, number in (("time per step", "ms"), ("memory", "MiB"))
}

if __name__ == "__main__":
    sys.exit(harness.main("tricks", CASES, RATIOS, add))
