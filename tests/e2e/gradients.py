"""A worker that takes the gradient of one micro-batch, and leaves it in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ptrain import stages
from ptrain.job import open_spec


def leave(spec: str, file: str) -> None:
    """Write the gradients of the first micro-batch, its loss by term, and its base's hidden states."""
    run = open_spec(Path(spec))
    batch: Any = next(iter(run.train_loader))
    counts = stages.global_counts(run, [batch])
    loss = stages.forward_loss(run, batch)
    run.backward(loss, counts)
    made = {f"gradient/{name}": p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    made |= {f"loss/{term}": value.detach() / counts[term] for term, value in loss.sums.items()}
    kept = {name: value for name, value in batch.items() if hasattr(value, "numel")}
    weights = {f"weight/{name}": p.detach() for name, p in run.model.speculator.named_parameters()}
    save_file({name: value.contiguous() for name, value in {**made, **kept, **weights}.items()}, file)
