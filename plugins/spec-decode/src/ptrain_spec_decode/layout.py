"""What a speculator is made of: its kind and sizes, the name and shape of each of its tensors, and its configuration.

Names and fields are those of the folders that serving engines load: `mlp_speculator` of vLLM, and the speculators of
Arctic Inference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["mlp", "lstm"]
Method = Literal["sum_rnn", "sum_lstm"]
GATES = ("forget", "input", "cell", "output")
"""The gates of `sum_lstm`, by what their tensors are called."""


def widths(value: int | str) -> tuple[int, ...]:
    """The layers of a stacked dimension: `4096` is one, `"4096.2048"` is two.

    Raises:
        ValueError: it is neither.
    """
    parts = str(value).split(".")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{value!r} is no width: expected a number, or several with dots between, such as 4096.2048")
    return tuple(int(part) for part in parts)


@dataclass(frozen=True)
class Shape:
    """The kind and the sizes of a speculator.

    Attributes:
        kind: `mlp`, or `lstm` with its `method`.
        hidden_size, vocab_size: of the base.
        n_predict: heads.
        inner: widths of the state, a layer each; the last one is what a head and the next state see.
        proj, emb: widths of what a state, and a token, becomes before both are added.
    """

    kind: Kind
    hidden_size: int
    vocab_size: int
    n_predict: int = 3
    inner: tuple[int, ...] = (4096,)
    proj: tuple[int, ...] = (4096,)
    emb: tuple[int, ...] = (4096,)
    tie_weights: bool = False
    scale_input: bool = False
    method: Method = "sum_rnn"
    tie_lstm_embs: bool = False

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise ValueError(problem)

    def _problem(self) -> str | None:
        if self.tie_weights and self.n_predict < 2:
            return "`speculator_tie_weights` ties the weights of several heads, and there is one"
        if not self.proj[-1] == self.emb[-1] == self.inner[0]:
            return (
                f"the last width of `proj_dim` ({self.proj[-1]}), the last of `emb_dim` ({self.emb[-1]}) and the first "
                f"of `speculator_width` ({self.inner[0]}) must be the same number: what they make is added"
            )
        if self.kind == "mlp":
            if max(map(len, (self.inner, self.proj, self.emb))) > 1:
                return "stacked widths belong to `speculator: lstm`"
            lstm = self.method != "sum_rnn" or self.tie_lstm_embs
            return "`method: sum_lstm` and `tie_lstm_embs` belong to `speculator: lstm`" if lstm else None
        if self.method == "sum_lstm":
            return self._lstm_problem()
        return "`tie_lstm_embs` belongs to `method: sum_lstm`" if self.tie_lstm_embs else None

    def _lstm_problem(self) -> str | None:
        if not self.tie_weights:
            return "`method: sum_lstm` has one cell for all heads: set `speculator_tie_weights: true`"
        if max(map(len, (self.inner, self.proj, self.emb))) > 1:
            return "`method: sum_lstm` has no stacked widths"
        return None

    @property
    def embedding_scale(self) -> float:
        """What an embedding is multiplied by where it is added to a state.

        Source: Wertheimer et al. 2024, "Accelerating Production LLMs with Combined Token/Embedding Speculators": with
        a = 0.5^(0.5/n), the base's state makes up half of what the last head sees, in expectation.
        """
        a = 0.5 ** (0.5 / self.n_predict)
        return math.sqrt((1 - a * a) * self.emb[-1] / 2) / a

    @property
    def sets(self) -> int:
        """How many sets of weights there are: one for each head, or one for all."""
        return 1 if self.tie_weights else self.n_predict

    @property
    def projections(self) -> int:
        """How many projections: the first reads the base's state, and so is never shared."""
        if self.kind == "lstm" and self.method == "sum_lstm":
            return 2
        return min(2, self.n_predict) if self.tie_weights else self.n_predict

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by its name in the saved file; tied ones once."""
        found = {f"head.{i}.weight": (self.vocab_size, self.inner[-1]) for i in range(self.sets)}
        if self.kind == "lstm" and self.method == "sum_lstm":
            return {**found, **self._cell_tensors()}
        for i in range(self.sets):
            found |= _stack(f"emb.{i}", (self.vocab_size, self.emb[0]), self.emb, self.kind)
            found |= _state(f"ln.{i}", self.inner, self.kind)
        for i in range(self.projections):
            inside = self.hidden_size if i == 0 else self.inner[-1]
            found |= _stack(f"proj.{i}", (self.proj[0], inside), self.proj, self.kind)
        return found

    def _cell_tensors(self) -> dict[str, tuple[int, ...]]:
        width = self.inner[0]
        found: dict[str, tuple[int, ...]] = {}
        for gate in GATES:
            if gate == "forget" or not self.tie_lstm_embs:
                found[f"{gate}_emb.0.weight"] = (self.vocab_size, width)
            found[f"{gate}_proj.0.weight"] = (width, self.hidden_size)
            found[f"{gate}_proj.1.weight"] = (width, width)
        for norm in ("cell_ln.0", "state_ln.0"):
            found |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        return found

    @property
    def unserved(self) -> str | None:
        """What about it Arctic Inference, which serves this kind, can't load; None if there is nothing."""
        if self.kind == "lstm" and self.method == "sum_lstm" and not self.tie_lstm_embs:
            return "a cell whose gates have embeddings of their own (set `tie_lstm_embs: true`)"
        for key, sizes in (("proj_dim", self.proj), ("emb_dim", self.emb)):
            if len(set(sizes)) > 1:
                return f"a stack of unequal widths in `{key}`"
        return None

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def _stack(name: str, first: tuple[int, ...], sizes: tuple[int, ...], kind: Kind) -> dict[str, tuple[int, ...]]:
    """An embedding or a projection; in a stack, norm, activation and a linear layer for each further width."""
    if kind == "mlp":
        return {f"{name}.weight": first}
    found = {f"{name}.0.weight": first}
    for at, (before, after) in enumerate(itertools.pairwise(sizes)):
        norm, linear = f"{name}.{3 * at + 1}", f"{name}.{3 * at + 3}"
        found |= {f"{norm}.weight": (before,), f"{norm}.bias": (before,), f"{linear}.weight": (after, before)}
    return found


def _state(name: str, sizes: tuple[int, ...], kind: Kind) -> dict[str, tuple[int, ...]]:
    """What is done with the sum; in a stack, activation, a linear layer and a norm for each further width."""
    if kind == "mlp":
        return {f"{name}.weight": sizes, f"{name}.bias": sizes}
    found = {f"{name}.0.weight": sizes[:1], f"{name}.0.bias": sizes[:1]}
    for at, (before, after) in enumerate(itertools.pairwise(sizes)):
        linear, norm = f"{name}.{3 * at + 2}", f"{name}.{3 * at + 3}"
        found |= {f"{linear}.weight": (after, before), f"{norm}.weight": (after,), f"{norm}.bias": (after,)}
    return found


def file_name(name: str) -> str:
    """What a parameter of a `Speculator` is called in the saved file."""
    return name.replace("heads.", "head.", 1).replace(".norm.", ".")
