"""The published layouts of speculators: every tensor's name and shape, of small ones of each kind."""

from __future__ import annotations

from typing import Any

import torch

from ptrain_spec_decode.layout import Shape
from ptrain_spec_decode.speculator import Speculator, make

H, V, W = 20, 50, 16
"""Width of the base, vocabulary, width of the speculator."""


def norm(name: str, width: int = W) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


MLP_TIED = {
    "emb.0.weight": (V, W),
    "head.0.weight": (V, W),
    "proj.0.weight": (W, H),
    "proj.1.weight": (W, W),
    **norm("ln.0"),
}
MLP = {
    "emb.0.weight": (V, W), "emb.1.weight": (V, W), "emb.2.weight": (V, W),
    "head.0.weight": (V, W), "head.1.weight": (V, W), "head.2.weight": (V, W),
    "proj.0.weight": (W, H), "proj.1.weight": (W, W), "proj.2.weight": (W, W),
    **norm("ln.0"), **norm("ln.1"), **norm("ln.2"),
}  # fmt: skip
RNN_TIED = {
    "emb.0.0.weight": (V, W), "head.0.weight": (V, W), "proj.0.0.weight": (W, H), "proj.1.0.weight": (W, W),
    **norm("ln.0.0"),
}  # fmt: skip
RNN = {
    "emb.0.0.weight": (V, W), "emb.1.0.weight": (V, W), "emb.2.0.weight": (V, W),
    "head.0.weight": (V, W), "head.1.weight": (V, W), "head.2.weight": (V, W),
    "proj.0.0.weight": (W, H), "proj.1.0.weight": (W, W), "proj.2.0.weight": (W, W),
    **norm("ln.0.0"), **norm("ln.1.0"), **norm("ln.2.0"),
}  # fmt: skip
STACKED = {
    # A stack: norm, activation, linear; for the state, norm first, then activation, linear, norm.
    "emb.0.0.weight": (V, W), **norm("emb.0.1"), "emb.0.3.weight": (W, W),
    "proj.0.0.weight": (W, H), **norm("proj.0.1"), "proj.0.3.weight": (W, W),
    "proj.1.0.weight": (W, 8), **norm("proj.1.1"), "proj.1.3.weight": (W, W),
    **norm("ln.0.0"), "ln.0.2.weight": (8, W), **norm("ln.0.3", 8), "head.0.weight": (V, 8),
}  # fmt: skip
GATES = {
    f"{gate}_proj.{i}.weight": (W, inside)
    for gate in ("forget", "input", "cell", "output")
    for i, inside in enumerate((H, W))
}
LSTM_TIED = {"forget_emb.0.weight": (V, W), "head.0.weight": (V, W), **GATES, **norm("cell_ln.0"), **norm("state_ln.0")}
LSTM = {**LSTM_TIED, "input_emb.0.weight": (V, W), "cell_emb.0.weight": (V, W), "output_emb.0.weight": (V, W)}


def shape(kind: str, **changes: Any) -> Shape:
    sizes = {"hidden_size": H, "vocab_size": V, "inner": (W,), "proj": (W,), "emb": (W,)}
    return Shape(**{"kind": kind, **sizes, **changes})


PUBLISHED = {
    "mlp": (shape("mlp"), MLP),
    "mlp, tied": (shape("mlp", tie_weights=True, scale_input=True), MLP_TIED),
    "sum_rnn": (shape("lstm"), RNN),
    "sum_rnn, tied": (shape("lstm", tie_weights=True), RNN_TIED),
    "sum_rnn, stacked": (shape("lstm", tie_weights=True, inner=(W, 8), proj=(W, W), emb=(W, W)), STACKED),
    "sum_lstm": (shape("lstm", method="sum_lstm", tie_weights=True), LSTM),
    "sum_lstm, tied": (shape("lstm", method="sum_lstm", tie_weights=True, tie_lstm_embs=True), LSTM_TIED),
}  # fmt: skip


def drawn(kind: Shape, seed: int = 0) -> Speculator:
    """A speculator of this shape, with weights."""
    made = make(kind)
    made.initialise(torch.Generator().manual_seed(seed))
    return made
