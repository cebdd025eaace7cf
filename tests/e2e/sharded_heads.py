"""Workers that take a step with an output layer in tiles, one of them without a label; and the same step by formula."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional

from ptrain import engine as engines
from ptrain.model import divergence
from ptrain.model.divergence import token_kl
from ptrain.model.logprobs import token_logprobs
from ptrain.model.nll import token_nll
from ptrain.weights import whole

VOCABULARY, HIDDEN, INPUT, WORKERS, ROWS = 37, 6, 5, 2, 3


@dataclass(frozen=True)
class Case:
    """A ZeRO stage, what is computed, and an output layer."""

    stage: int
    of: str
    head: str = "plain"


CASES = {
    f"{of}, ZeRO {stage}, {head}": Case(stage, of, head)
    for of, stage, head in [
        ("nll", 0, "plain"), ("nll", 2, "plain"), ("nll", 3, "plain"), ("nll", 3, "adapter"), ("nll", 3, "frozen"),
        ("logprobs", 3, "plain"), ("logprobs", 3, "adapter"), ("kl", 0, "plain"), ("kl", 3, "plain"),
        ("kl", 3, "adapter"),
    ]
}  # fmt: skip


class Adapted(torch.nn.Module):
    """A frozen output layer with an adapter beside it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = torch.nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states) + 0.5 * self.up(self.down(states))


class Tiny(torch.nn.Module):
    """A body and an output layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(INPUT, HIDDEN)
        head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=True)
        self.head: Any = Adapted(head) if kind == "adapter" else head.requires_grad_(kind != "frozen")

    def get_output_embeddings(self) -> Any:
        return self.head


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of body and teacher, and labels, none of which is on rank 1."""
    drawn = torch.Generator().manual_seed(rank)
    inputs, teacher = torch.randn(2, 2, 11, INPUT, generator=drawn)
    labels = torch.randint(0, VOCABULARY, (2, 11), generator=drawn)
    labels[0, :3] = -100
    return inputs, teacher, torch.full_like(labels, -100) if rank else labels


def train(folder: Path) -> None:
    """Take the step of every case; rank 0 writes values and weights."""
    engines.start("cpu", 0)
    divergence.TILE_BYTES = 4 * VOCABULARY * ROWS
    rank = torch.distributed.get_rank()
    for name, case in CASES.items():
        found = learnt(case, rank)
        if rank == 0:
            save_file(found, folder / f"{name}.safetensors")


def learnt(case: Case, rank: int) -> dict[str, torch.Tensor]:
    model = Tiny(case.head)
    inputs, teacher, labels = batch(rank)
    zero = {"stage": case.stage, "stage3_param_persistence_threshold": 0}
    config = {
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": None,
    }  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = engines.Engine(model, optimizer, config, 0.0)
    values = []
    for _ in range(2):
        value = engine(lambda: loss(case, model, inputs, teacher, labels))
        engine.backward(value)
        engine.update()
        values.append(value.detach())
    with torch.no_grad():
        values.append(engine(lambda: loss(case, model, inputs, teacher, labels)))
    weights = {name: whole(p).clone() for name, p in model.named_parameters()}
    return {"values": torch.stack(values), **weights}


def loss(case: Case, model: Any, inputs: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    hidden = model.body(inputs)
    if case.of == "nll":
        return token_nll(model.head, hidden, labels, ROWS)
    if case.of == "logprobs":
        return -token_logprobs(model.head, hidden, labels, ROWS).square().sum()
    with torch.no_grad():
        states = model.body(teacher)
    return token_kl(model.head, hidden, states, labels, 1.5, VOCABULARY).sum()


def expected(case: Case) -> dict[str, torch.Tensor]:
    """The same by whole logits, of all workers' rows in one process; `values` are rank 0's."""
    model = Tiny(case.head)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    values = []
    for _ in range(2):
        optimizer.zero_grad()
        first, *others = (by_formula(case, model, *batch(rank)) for rank in range(WORKERS))
        sum(others, start=first).backward()
        optimizer.step()
        values.append(first.detach())
    values.append(by_formula(case, model, *batch(0)).detach())
    return {"values": torch.stack(values), **{name: p.detach() for name, p in model.named_parameters()}}


def by_formula(
    case: Case, model: Any, inputs: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    logits = model.head(model.body(inputs))
    if case.of == "kl":
        logq = torch.log_softmax(logits / 1.5, -1)
        with torch.no_grad():
            logp = torch.log_softmax(model.head(model.body(teacher)) / 1.5, -1)
        each = functional.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
        return (each * (labels != -100)).sum()
    each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return each.sum() if case.of == "nll" else -each.square().sum()
