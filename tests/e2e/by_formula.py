"""Speculators as formulas for one position, with nothing of ptrain in them but the names of tensors in a file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ptrain_spec_decode.layout import Shape

Weights = dict[str, torch.Tensor]


def norm(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    divided = x / torch.sqrt((x * x).mean() + 1e-6)
    return weights[f"{name}.weight"] * divided + weights[f"{name}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def logits(kind: Shape, weights: Weights, hidden: torch.Tensor, tokens: list[int]) -> list[torch.Tensor]:
    """Of each head, [v], from a base's hidden state [h]."""
    a = 0.5 ** (0.5 / kind.n_predict)
    scale = math.sqrt((1 - a**2) * kind.emb[-1] / 2) / a
    state, cell, found = hidden, torch.zeros(kind.inner[0], dtype=hidden.dtype), []
    if kind.scale_input:
        state = state / torch.sqrt((state * state).mean() + 1e-6) / math.sqrt(2)
    for i, token in enumerate(tokens):
        own, at = (0, min(i, 1)) if kind.tie_weights else (i, i)
        if kind.method == "sum_lstm":
            sums = {}
            for gate in ("forget", "input", "cell", "output"):
                embeddings = weights[f"{'forget' if kind.tie_lstm_embs else gate}_emb.0.weight"]
                sums[gate] = weights[f"{gate}_proj.{at}.weight"] @ state + scale * embeddings[token]
            forget, enter, leave = (1 / (1 + torch.exp(-sums[gate])) for gate in ("forget", "input", "output"))
            cell = forget * cell + enter * gelu(norm(sums["cell"], weights, "cell_ln.0"))
            state = leave * gelu(norm(cell, weights, "state_ln.0"))
        else:
            state = rnn(kind, weights, state, token, own, at, scale)
        found.append(weights[f"head.{own}.weight"] @ state)
    return found


def rnn(
    kind: Shape, weights: Weights, state: torch.Tensor, token: int, own: int, at: int, scale: float
) -> torch.Tensor:
    if kind.kind == "mlp":
        summed = weights[f"proj.{at}.weight"] @ state + scale * weights[f"emb.{own}.weight"][token]
        return gelu(norm(summed, weights, f"ln.{own}"))
    embedded, projected = weights[f"emb.{own}.0.weight"][token], weights[f"proj.{at}.0.weight"] @ state
    if len(kind.emb) > 1:
        embedded = weights[f"emb.{own}.3.weight"] @ gelu(norm(embedded, weights, f"emb.{own}.1"))
    if len(kind.proj) > 1:
        projected = weights[f"proj.{at}.3.weight"] @ gelu(norm(projected, weights, f"proj.{at}.1"))
    x = norm(projected + scale * embedded, weights, f"ln.{own}.0")
    if len(kind.inner) > 1:
        x = norm(weights[f"ln.{own}.2.weight"] @ gelu(x), weights, f"ln.{own}.3")
    return gelu(x)
