"""Speculators: small heads that draft the tokens after the base's next one, from its last hidden state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ptrain_spec_decode.layout import GATES

if TYPE_CHECKING:
    from ptrain_spec_decode.layout import Shape

EPS = 1e-6


class State(NamedTuple):
    """What one head hands to the next.

    Attributes:
        hidden: [..., d].
        cell: [..., d] of an LSTM; None elsewhere.
    """

    hidden: torch.Tensor
    cell: torch.Tensor | None


class Norm(nn.Module):
    """Division by the root mean square, then a weight and a bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        # By this name optimizers know a weight that does not decay.
        self.norm = Affine(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised along the last dimension."""
        return self.norm(normalised(x))


class Affine(nn.Module):
    """A weight and a bias for each feature."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` times the weight, plus the bias."""
        return x * self.weight + self.bias


def normalised(x: torch.Tensor) -> torch.Tensor:
    """`x` divided by its root mean square along the last dimension, which is computed in fp32 at least."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


class Speculator(nn.Module):
    """Heads that draft: head i says which token comes i + 2 places after the one whose hidden state it begins with.

    To draft, `state = begin(hidden)`, then for each head `state = advance(state, last token, i)` and
    `head(i)(state.hidden)` gives the logits of the next token. Head 0 is advanced with the base's own next token.

    Attributes:
        n_predict: how many heads there are.
        vocab_size: of the base and of every head.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.n_predict, self.vocab_size = shape.n_predict, shape.vocab_size
        self.heads = nn.ModuleList([linear(shape.inner[-1], shape.vocab_size) for _ in range(shape.sets)])

    def begin(self, hidden: torch.Tensor) -> State:
        """The state before the first head, from the base's last hidden states [..., h], after its final norm."""
        return State(normalised(hidden) / math.sqrt(2) if self.shape.scale_input else hidden, None)

    def advance(self, state: State, tokens: torch.Tensor, head: int) -> State:
        """The state from which head `head` reads, after `tokens`, int64 [...]."""
        raise NotImplementedError

    def head(self, i: int) -> nn.Linear:
        """What maps the hidden part of a state to the logits of head `i`."""
        return self.heads[0 if self.shape.tie_weights else i]  # type: ignore[return-value]

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights of embeddings, projections and heads, with the standard deviation that `deviation` says.

        Norms begin with a weight of 1 and a bias of 0.
        """
        for module in self.modules():
            if isinstance(module, Affine):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=self.deviation(module.weight), generator=generator)

    def deviation(self, weight: torch.Tensor) -> float:
        """The standard deviation that `weight` is drawn with."""
        raise NotImplementedError


class MLPSpeculator(Speculator):
    """Each head adds its token to the state, normalises and activates it.

    Source: Wertheimer et al. 2024, "Accelerating Production LLMs with Combined Token/Embedding Speculators".
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        width = shape.inner[0]
        self.emb = nn.ModuleList([nn.Embedding(shape.vocab_size, width) for _ in range(shape.sets)])
        inside = [shape.hidden_size] + [width] * (shape.projections - 1)
        self.proj = nn.ModuleList([linear(size, width) for size in inside])
        self.ln = nn.ModuleList([Norm(width) for _ in range(shape.sets)])

    def advance(self, state: State, tokens: torch.Tensor, head: int) -> State:
        """GELU of the normalised sum of the projected state and the embedded tokens."""
        own = 0 if self.shape.tie_weights else head
        summed = torch.add(
            self.proj[min(head, len(self.proj) - 1)](state.hidden),
            self.emb[own](tokens),
            alpha=self.shape.embedding_scale,
        )
        return State(nn.functional.gelu(self.ln[own](summed)), None)

    def deviation(self, weight: torch.Tensor) -> float:
        """1 / sqrt(width)."""
        return 1 / math.sqrt(self.shape.inner[0])


class StackedSpeculator(MLPSpeculator):
    """`sum_rnn`: as `MLPSpeculator`, and embedding, projection and state may have several layers."""

    def __init__(self, shape: Shape) -> None:
        Speculator.__init__(self, shape)
        inside = [shape.hidden_size] + [shape.inner[-1]] * (shape.projections - 1)
        embeddings = [nn.Embedding(shape.vocab_size, shape.emb[0]) for _ in range(shape.sets)]
        self.emb = nn.ModuleList([stack(first, shape.emb) for first in embeddings])
        self.proj = nn.ModuleList([stack(linear(size, shape.proj[0]), shape.proj) for size in inside])
        self.ln = nn.ModuleList([state_stack(shape.inner) for _ in range(shape.sets)])

    def deviation(self, weight: torch.Tensor) -> float:
        """1 / sqrt(the smaller side)."""
        return 1 / math.sqrt(min(weight.shape))


class LSTMSpeculator(Speculator):
    """`sum_lstm`: one cell for all heads, whose gates add the token to the state; what is drafted stays in its memory.

    Source: Arctic Inference's LSTM speculator.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        width = shape.inner[0]
        for gate in GATES:
            if gate == "forget" or not shape.tie_lstm_embs:
                setattr(self, f"{gate}_emb", nn.ModuleList([nn.Embedding(shape.vocab_size, width)]))
            projections = [linear(shape.hidden_size, width), linear(width, width)]
            setattr(self, f"{gate}_proj", nn.ModuleList(projections))
        self.cell_ln, self.state_ln = nn.ModuleList([Norm(width)]), nn.ModuleList([Norm(width)])

    def advance(self, state: State, tokens: torch.Tensor, head: int) -> State:
        """One step of the cell; before the first one its memory is empty."""
        gelu = nn.functional.gelu
        forget, enter, candidate, leave = self._gates(state.hidden, tokens, min(head, 1))
        # The empty memory is multiplied too: a weight without any gradient would decay under one ZeRO stage and not
        # under another.
        memory = torch.zeros_like(candidate) if state.cell is None else state.cell
        cell = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * gelu(self.cell_ln[0](candidate))
        return State(torch.sigmoid(leave) * gelu(self.state_ln[0](cell)), cell)

    def _gates(self, hidden: torch.Tensor, tokens: torch.Tensor, at: int) -> list[torch.Tensor]:
        shared = self.forget_emb[0](tokens) if self.shape.tie_lstm_embs else None  # type: ignore[operator]
        sums = []
        for gate in GATES:
            embedded = getattr(self, f"{gate}_emb")[0](tokens) if shared is None else shared
            projected = getattr(self, f"{gate}_proj")[at](hidden)
            sums.append(torch.add(projected, embedded, alpha=self.shape.embedding_scale))
        return sums

    def deviation(self, weight: torch.Tensor) -> float:
        """1 / sqrt(the smaller side)."""
        return 1 / math.sqrt(min(weight.shape))


def make(shape: Shape) -> Speculator:
    """A speculator of this shape, with weights not yet drawn."""
    if shape.kind == "mlp":
        return MLPSpeculator(shape)
    return LSTMSpeculator(shape) if shape.method == "sum_lstm" else StackedSpeculator(shape)


def linear(inside: int, outside: int) -> nn.Linear:
    """A linear layer without a bias."""
    return nn.Linear(inside, outside, bias=False)


def stack(first: nn.Module, sizes: Sequence[int]) -> nn.Sequential:
    """`first`, then norm, activation and a linear layer for each further width."""
    layers = [first]
    for before, after in itertools.pairwise(sizes):
        layers += [Norm(before), nn.GELU(), linear(before, after)]
    return nn.Sequential(*layers)


def state_stack(sizes: Sequence[int]) -> nn.Sequential:
    """A norm, then activation, a linear layer and a norm for each further width."""
    layers: list[nn.Module] = [Norm(sizes[0])]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.GELU(), linear(before, after), Norm(after)]
    return nn.Sequential(*layers)
