"""The loss of `swiftkv` by the dense reference, for the bare loop and for a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bare_loop
import torch
from swiftkv_dense import Dense

WEIGHED = [(0.0, 2.0, -2), (1.0, 2.0, -1), (2.5, 0.7, 3)]
"""`hidden_loss_mult`, `logits_loss_temp`, `hidden_loss_layer`."""


class Oracle:
    """The parts of a step's loss, a document each, and its terms."""

    def __init__(self, temperature: float, weight: float, layer: int) -> None:
        self.temperature, self.weight, self.layer = temperature, weight, layer
        self.terms: list[dict[str, float]] = []

    def __call__(self, model: Any, rows: bare_loop.Rows) -> Iterator[torch.Tensor]:
        dense = Dense(dict(model.named_parameters()), model.config)
        documents = [document for row in rows for document in row]
        labels = sum(label != -100 for _, labels in documents for label in labels[1:])
        tokens = sum(len(ids) for ids, _ in documents)
        step = {"loss/logits": 0.0, "loss/hidden": 0.0}
        for ids, marked in documents:
            one, other = dense.losses(torch.tensor(ids), torch.tensor(marked), self.temperature, self.layer)
            step["loss/logits"] += one.item() / labels
            step["loss/hidden"] += other.item() / tokens
            yield one / labels + self.weight * other / tokens
        self.terms.append(step)


def compare_gradients(recipes: list[dict[str, Any]]) -> None:
    """Fail where the gradient of a recipe's first micro-batch is another than the dense reference's."""
    import ptrain

    for recipe, settings in zip(recipes, WEIGHED, strict=True):
        with ptrain.open_run(recipe) as opened:
            run = opened.run
            batch = next(iter(run.train_loader))
            documents = [
                (row[:length].tolist(), [-100, *labels[: length - 1].tolist()])
                for row, labels, (length,) in zip(
                    batch["input_ids"], batch["shift_labels"], batch["document_lengths"], strict=True
                )
            ]
            loss, counts = run.call("loss", batch=batch), run.call("count", batch=batch)
            total = sum(loss.weights.get(term, 1.0) * value / counts[term] for term, value in loss.sums.items())
            own = [p for p in run.model.parameters() if p.requires_grad]
            found = torch.autograd.grad(total, own)
            weight, temperature, layer = settings
            expected = sum(Oracle(temperature, weight, layer)(run.model, [[document] for document in documents]))
            torch.testing.assert_close(total, expected, atol=1e-6, rtol=1e-6)
            for one, other in zip(found, torch.autograd.grad(expected, own), strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
