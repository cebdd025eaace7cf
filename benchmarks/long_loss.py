"""The loss of a large vocabulary beside the naive one: time and memory of hidden states to gradients.

    python benchmarks/long_loss.py

A vocabulary of 128,256 and hidden states of 1,024 numbers, a label at each of 4,096 tokens, forward and backward, in
fp32 and in bf16 on CPU. `naive` is torch's `cross_entropy` of all logits in fp32; `logprobs` is `token_logprobs`, whose
tiles are computed again in the backward pass; `nll` is `token_nll`, whose gradient is formed in the forward pass. Times
are CPU time of the process; memory is what it grew by, which holds the gradient of the output layer (501 MiB in fp32).
`32,768 tokens` is counted on the device `meta`: the tensors that are alive at a time, where nothing is computed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import harness
from step import memory

VOCABULARY, HIDDEN, TOKENS, MANY = 128256, 1024, 4096, 32768


def naive(head: Any, hidden: Any, labels: Any) -> Any:
    """All logits, and torch's cross-entropy."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(head(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum")


def logprobs(head: Any, hidden: Any, labels: Any) -> Any:
    """The log-probability of each label."""
    from ptrain.model.logprobs import tile_rows, token_logprobs

    return -token_logprobs(head, hidden, labels, tile_rows(VOCABULARY)).sum()


def nll(head: Any, hidden: Any, labels: Any) -> Any:
    """Their sum alone."""
    from ptrain.model.logprobs import tile_rows
    from ptrain.model.nll import token_nll

    return token_nll(head, hidden, labels, tile_rows(VOCABULARY))


WAYS: dict[str, Callable[[Any, Any, Any], Any]] = {"naive": naive, "logprobs": logprobs, "nll": nll}


def made(dtype: str, device: str = "cpu", tokens: int = TOKENS) -> tuple[Any, Any, Any]:
    """An output layer, hidden states and labels."""
    import torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, device=device, dtype=kind)
    hidden = torch.randn(1, tokens, HIDDEN, device=device, dtype=kind, requires_grad=True)
    return head, hidden, torch.randint(0, VOCABULARY, (1, tokens), device=device)


def one(way: str, dtype: str, options: argparse.Namespace) -> Mapping[str, float]:
    """A forward and a backward pass."""
    import ptrain.model.nll  # noqa: F401 - imports are not what is measured

    head, hidden, labels = made(dtype)
    before, begin = memory(), time.process_time()
    loss = WAYS[way](head, hidden, labels)
    (loss / TOKENS).backward()
    return {"s": time.process_time() - begin, "MiB": memory() - before, "loss": float(loss.detach()) / TOKENS}


def counted(options: argparse.Namespace) -> Mapping[str, float]:
    """The most bytes that are alive at a time, beside the output layer and its input."""
    import torch

    from ptrain.model.logprobs import picked, tile_rows
    from ptrain.model.nll import summed
    from ptrain.plan.activations import _Live

    rows, found = tile_rows(VOCABULARY), {}
    # Where there are no values, positions with a label can't be looked for.
    ways: dict[str, Callable[[Any, Any, Any], Any]] = {
        "naive": naive,
        "logprobs": lambda head, hidden, labels: -picked(head, hidden[0], labels[0], rows).sum(),
        "nll": lambda head, hidden, labels: summed(head, head, hidden[0], torch.empty_like(labels[0]), labels[0], rows),
    }
    for dtype in ("float32", "bfloat16"):
        for way, work in ways.items():
            head, hidden, labels = made(dtype, "meta", MANY)
            with _Live([head.weight, hidden, labels]) as live:
                work(head, hidden, labels).backward()
            found[f"{dtype} {way}, MiB"] = live.peak / 2**20
    return found


CASES: dict[str, harness.Case] = {
    **{f"{dtype} {way}": partial(one, way, dtype) for dtype in ("float32", "bfloat16") for way in WAYS},
    f"{MANY:,} tokens": counted,
}
AIMS: dict[tuple[str, str], float] = {("nll", "s"): 1.1}
WORDS = {"s": "time", "MiB": "memory"}
RATIOS = {
    **{
        f"{dtype}, {TOKENS:,} tokens, {WORDS[number]}, {way} to naive": harness.Ratio(
            f"{dtype} {way}.{number}", f"{dtype} naive.{number}", "less", AIMS.get((way, number))
        )
        for dtype in ("float32", "bfloat16") for way in ("logprobs", "nll") for number in WORDS
    },
    **{
        f"{dtype}, {MANY:,} tokens, memory, {way} to naive": harness.Ratio(
            f"{MANY:,} tokens.{dtype} {way}, MiB", f"{MANY:,} tokens.{dtype} naive, MiB", "less", 0.05
        )
        for dtype in ("float32", "bfloat16") for way in ("logprobs", "nll")
    },
}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    """The defaults of this benchmark."""
    parser.set_defaults(rounds=1)


if __name__ == "__main__":
    sys.exit(harness.main("long_loss", CASES, RATIOS, add))
