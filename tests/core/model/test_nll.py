"""The summed loss and its gradients against torch's cross-entropy of whole logits; under ZeRO, on unequal workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sharded_heads
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_worker import peak
from safetensors.torch import load_file

from ptrain.model import nll
from ptrain.model.head import OutputHead
from ptrain.model.logprobs import tile_rows, token_logprobs
from ptrain.model.nll import token_nll
from ptrain.testing.workers import run_workers

VOCABULARY = 23
EXACT = {torch.float64: 1e-8, torch.float32: 1e-5}


def made(dtype: torch.dtype, kind: str = "plain") -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A head of some kind, hidden states [3, 7, 5] and labels, some of which are none."""
    torch.manual_seed(0)
    layer: Any = torch.nn.Linear(5, VOCABULARY, bias="biased" in kind, dtype=dtype)
    if kind == "adapter":
        layer = sharded_heads.Adapted(layer)
    hidden = torch.randn(3, 7, 5, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (3, 7))
    labels[0, :3] = labels[2] = -100
    if kind == "frozen":
        layer.requires_grad_(False)
    if kind == "biased, weight frozen":
        layer.weight.requires_grad_(False)
    if kind == "scaled":
        return OutputHead(layer, 1.5), hidden, labels
    return (OutputHead(layer, 1.5, 0.5) if kind == "capped" else layer), hidden, labels


def trained(head: Any) -> list[torch.Tensor]:
    return [p for p in (head.layer if isinstance(head, OutputHead) else head).parameters() if p.requires_grad]


def cross_entropy(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


KINDS = ["plain", "biased", "biased, weight frozen", "frozen", "scaled", "capped", "adapter"]


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_equals_cross_entropy(rows: int, kind: str, dtype: torch.dtype) -> None:
    """Value and gradients, whatever the factor that comes back: to 1e-8 in fp64, to 1e-5 in fp32."""
    head, hidden, labels = made(dtype, kind)
    found, expected = token_nll(head, hidden, labels, rows), cross_entropy(head, hidden, labels)
    close = {"atol": EXACT[dtype], "rtol": EXACT[dtype]}
    torch.testing.assert_close(found, expected, **close)
    of = [hidden, *trained(head)]
    ours, theirs = (torch.autograd.grad(0.37 * value, of) for value in (found, expected))
    torch.testing.assert_close(ours, theirs, **close)
    with torch.no_grad():
        torch.testing.assert_close(token_nll(head, hidden, labels, rows), expected.detach(), **close)


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 30), share=st.floats(0, 1))
def test_is_the_sum_of_the_log_probabilities(seed: int, rows: int, share: float) -> None:
    """Wherever the labels stand, one of them or none included."""
    drawn = torch.Generator().manual_seed(seed)
    head, hidden, labels = made(torch.float64)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=drawn) > share, -100)
    found = token_nll(head, hidden, labels, rows)
    expected = -token_logprobs(head, hidden, labels, rows).sum()
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    ours, theirs = (torch.autograd.grad(value, [hidden, head.weight]) for value in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "adapter"])
def test_no_label_at_all(kind: str) -> None:
    """Zero, and a gradient of zeros: another worker's micro-batch may have labels."""
    head, hidden, labels = made(torch.float32, kind)
    found = token_nll(head, hidden, torch.full_like(labels, -100), 4)
    assert found == 0
    found.backward()
    assert not hidden.grad.any() and not any(p.grad.any() for p in trained(head))


@pytest.mark.parametrize("rows", [10, 10_000])
@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_half_precision_adds_up_in_full(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient is off by single roundings to bf16; neither tiles nor the factor add to that."""
    monkeypatch.setattr(nll, "PART_BYTES", 100)
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, VOCABULARY, dtype=torch.bfloat16)
    head = OutputHead(layer, 1.0, 30.0 if kind == "capped" else None)
    hidden = (1 + torch.randn(1, 4000, 8)).bfloat16().requires_grad_()
    labels = torch.randint(0, VOCABULARY, (1, 4000))
    token_nll(head, hidden, labels, rows).mul(1 / 3000).backward()
    found = [layer.weight.grad.float(), hidden.grad.float()]
    wide = hidden.detach().float().requires_grad_()
    layer.float().zero_grad()
    cross_entropy(head, wide, labels).mul(1 / 3000).backward()
    for one, other in zip(found, (layer.weight.grad, wide.grad), strict=True):
        assert (one - other).abs().max() < 0.015 * other.abs().max()
        assert abs((one * other).sum() / other.square().sum() - 1) < 5e-4


def test_under_autocast() -> None:
    """The output layer computes in the dtype of autocast, and its gradients come out in its own."""
    head, hidden, labels = made(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = token_nll(head, hidden, labels, 4), cross_entropy(head, hidden, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(value, [hidden, head.weight]) for value in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_a_second_backward_pass_is_an_error_and_no_wrong_gradient() -> None:
    """The first one has overwritten what was kept."""
    head, hidden, labels = made(torch.float32)
    total = token_nll(head, hidden, labels, 4)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_nothing_is_as_large_as_the_logits() -> None:
    """What the allocator has out at a time beside the gradient of the weight: a few tiles."""
    layer = torch.nn.Linear(16, 4096, bias=False)
    hidden, labels = torch.randn(1, 2048, 16, requires_grad=True), torch.zeros(1, 2048, dtype=torch.int64)
    rows, whole = 64, 4 * 2048 * 4096
    found = peak(lambda: token_nll(layer, hidden, labels, rows).backward())
    assert found < 4 * (4 * rows * 4096) + 2 * layer.weight.nbytes + 4 * hidden.nbytes < whole / 4


def test_tiles() -> None:
    """So many that their logits take a quarter of a GiB, or those that are asked for."""
    assert tile_rows(128256) == 2**28 // (4 * 128256)
    assert tile_rows(2**30) == 1
    assert tile_rows(128256, 100) == 100


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers made of each case."""
    folder = tmp_path_factory.mktemp("heads")
    run_workers(sharded_heads.train, folder, log=folder / "log", workers=2)
    return folder


@pytest.mark.parametrize("name", sharded_heads.CASES)
def test_workers_with_unequal_tiles(learnt: Path, name: str) -> None:
    """One has many labels and another none: under ZeRO-3 heads are gathered equally often, and all learn the same."""
    found, expected = load_file(learnt / f"{name}.safetensors"), sharded_heads.expected(sharded_heads.CASES[name])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
