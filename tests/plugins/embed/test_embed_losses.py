"""Every loss and its gradient against a dense reference, however the batch is cut into blocks."""

from __future__ import annotations

from typing import Any

import embed_dense as dense
import pytest
import torch

from ptrain_embed import contrast
from ptrain_embed.labels import Labels
from ptrain_embed.plugin import Embed

KEYS: dict[str, dict[str, Any]] = {
    "infonce": {},
    "hard negatives alone": {"in_batch_negatives": False, "temperature": 0.1},
    "symmetric": {"symmetric": True, "temperature": 0.05},
    "matryoshka": {"matryoshka": {8: 0.5, 3: 2.0, 16: 1.5}},
    "margin_mse": {"loss": "margin_mse", "teacher_temperature": 2.0},
    "kl": {"loss": "kl", "temperature": 0.3, "teacher_temperature": 0.5, "matryoshka": {5: 1.0}},
    "cosent": {"loss": "cosent", "temperature": 0.05},
}


def made(seed: int, count: int, keys: dict[str, Any]) -> tuple[list[dense.Query], torch.Tensor]:
    rows = dense.queries(seed, count, scores=keys.get("loss", "infonce") != "infonce")
    size = sum(1 + len(row.documents) for row in rows)
    values = torch.randn(size, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows, torch.nn.functional.normalize(values, dim=1).requires_grad_()


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("scores", [2**23, 60, 1], ids=["one block", "blocks", "query by query"])
def test_equals_the_dense_loss(keys: dict[str, Any], scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With duplicates, missing labels and ragged negatives; on three workers, one of which has no query."""
    monkeypatch.setattr(contrast, "BLOCK", scores)
    trainer = Embed(Embed.Config.model_validate(keys))
    for seed in range(4):
        rows, embeddings = made(seed, 13, keys)
        expected = dense.loss(rows, embeddings, keys)
        (wanted,) = torch.autograd.grad(expected, embeddings)
        labels = Labels.of([dense.batch(rows)])
        measure = trainer.measure(16, normalise=True)
        count = sum(trainer.objective.count(row.relations, row.scores) for row in rows)
        for parts in ([range(13)], [range(5), range(5, 5), range(5, 13)]):
            found = [measure(embeddings, labels, part) for part in parts]
            loss = sum(float(one.losses.sum()) for _, one in found) / count
            assert loss == pytest.approx(expected.item(), rel=1e-6, abs=1e-9), seed
            gradient = sum((gradient for gradient, _ in found), start=torch.zeros_like(embeddings)) / count
            torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
            gradient, silent = measure(embeddings, labels, parts[0], learn=False)
            assert not gradient.any()
            torch.testing.assert_close(silent.losses, found[0][1].losses)
        if "loss" not in keys:
            right = float(sum(one.metrics["accuracy"].sum() for _, one in found)) / count
            assert right == pytest.approx(dense.accuracy(rows, embeddings, keys.get("in_batch_negatives", True)))


def test_labels_of_workers_become_those_of_one_batch() -> None:
    rows = dense.queries(3, 11, scores=True)
    whole = Labels.of([dense.batch(rows)])
    cut = [Labels.of([dense.batch(part)]) for part in (rows[:4], rows[4:4], rows[4:])]
    together = Labels.unpacked([one.packed() for one in cut])
    assert Labels.of([dense.batch(rows[:7]), dense.batch([]), dense.batch(rows[7:])]).packed().equal(whole.packed())
    for name, value in vars(whole).items():
        torch.testing.assert_close(vars(together)[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_batch_without_negatives_has_no_loss_and_no_gradient() -> None:
    """One pair, or pairs whose texts are all the same: nothing to learn, and nothing that is not a number."""
    measure = Embed(Embed.Config.model_validate({"symmetric": True})).measure(16, normalise=True)
    for rows in ([dense.Query(1, [2], [1], [], [2])], [dense.Query(1, [2, 2], [1, 0], [], [2])] * 2):
        embeddings = torch.nn.functional.normalize(torch.randn(sum(1 + len(row.documents) for row in rows), 16), dim=1)
        gradient, found = measure(embeddings, Labels.of([dense.batch(rows)]), range(len(rows)))
        assert not found.losses.any()
        assert not gradient.any()
