"""What a worker does to see that a step with cached gradients is the step of the whole batch, with dropout too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import embed_dense as dense
import torch

from ptrain.job import open_spec
from ptrain.seeds import seed_everything


def replay(spec: Path) -> None:
    """Write to `replay.json` the loss and the norm of its gradient: of the whole batch, and of a step."""
    run = open_spec(spec)
    trainer = run.stack.layers[1].plugin
    stream = iter(run.train_loader)
    batches = [next(stream) for _ in range(run.accumulation)]
    seed_everything(1, 1)
    parts = [trainer.embed(run, batch) for batch in batches]
    rows = [row for batch in batches for row in queries_of(batch)]
    loss = dense.loss(rows, torch.cat(parts), {"temperature": trainer.config.temperature})
    weights = [p for p in run.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    norm = torch.stack([one.norm() for one in gradients if one is not None]).norm()
    seed_everything(1, 1)
    step = run.call("step", batches=batches)
    found = {"whole": [loss.item(), norm.item()], "step": [step.loss, step.metrics["grad_norm"]]}
    (spec.parent / "replay.json").write_text(json.dumps(found))


def queries_of(batch: dict[str, Any]) -> list[dense.Query]:
    """What is known of the rows of a micro-batch."""
    columns = ("query_key", "document_keys", "relations", "scores", "positive_keys")
    return [dense.Query(*values) for values in zip(*(batch[name] for name in columns), strict=True)]
