"""Drafts: chains and trees of candidates for the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ptrain_spec_decode.speculator import Speculator, State


@dataclass(frozen=True)
class Tree:
    """Candidates below a root, which is the base's own next token; parents come before their children.

    Attributes:
        tokens: the root and all candidates.
        parents: where the parent of each stands; -1 for the root.
    """

    tokens: list[int]
    parents: list[int]

    @property
    def depths(self) -> list[int]:
        """How far below the root each one stands."""
        found: list[int] = []
        for parent in self.parents:
            found.append(found[parent] + 1 if parent >= 0 else 0)
        return found

    @property
    def is_chain(self) -> bool:
        """Whether each one is the only child of the one before."""
        return self.parents == list(range(-1, len(self.tokens) - 1))

    def seen(self) -> torch.Tensor:
        """Which of them each one sees: itself and those above it, bool [n, n]."""
        found = torch.eye(len(self.tokens), dtype=torch.bool)
        for at, parent in enumerate(self.parents[1:], 1):
            found[at] |= found[parent]
        return found

    def path(self, choices: Sequence[int]) -> list[int]:
        """From the root on, the candidates that the base itself chose; `choices` is its next token after each one."""
        child = {(parent, self.tokens[at]): at for at, parent in enumerate(self.parents)}
        found = [0]
        while (below := child.get((found[-1], choices[found[-1]]))) is not None:
            found.append(below)
        return found


def draft(
    speculator: Speculator, hidden: torch.Tensor, token: int, top_k: Sequence[int], paths: int | None = None
) -> Tree:
    """The candidates below `token`: of each head the likeliest `top_k[i]`, below each candidate of the head before.

    Args:
        hidden: the last hidden state [h] that made the base choose `token`.
        paths: keep so many paths from the root to a leaf, those with the largest product of probabilities.
    """
    with torch.no_grad():
        tokens, parents, scores = _grown(speculator, hidden, token, top_k)
    tree = Tree(tokens, parents)
    leaves = len(scores)
    if paths is None or leaves <= paths:
        return tree
    first = len(tokens) - leaves
    return _pruned(tree, [first + at for at in scores.topk(paths).indices.tolist()])


def _grown(
    speculator: Speculator, hidden: torch.Tensor, token: int, top_k: Sequence[int]
) -> tuple[list[int], list[int], torch.Tensor]:
    """Tokens, parents, and of the last level the summed log-probabilities, [leaves]."""
    last = torch.tensor([token], device=hidden.device)
    state, scores = speculator.begin(hidden[None]), torch.zeros(1, device=hidden.device)
    levels, parents, first = [last], [-1], 0
    for at, count in enumerate(top_k):
        state = speculator.advance(state, last, at)
        found = speculator.head(at)(state.hidden).float().log_softmax(-1).topk(count)
        scores, last = (scores[:, None] + found.values).flatten(), found.indices.flatten()
        rows = torch.arange(len(found.indices), device=hidden.device).repeat_interleave(count)
        state = _rows(state, rows)
        parents += [first + row // count for row in range(len(last))]
        first += len(levels[-1])
        levels.append(last)
    return torch.cat(levels).tolist(), parents, scores


def _rows(state: State, rows: torch.Tensor) -> State:
    return type(state)(state.hidden[rows], None if state.cell is None else state.cell[rows])


def _pruned(tree: Tree, leaves: Sequence[int]) -> Tree:
    """The tree of these leaves and of what stands above them."""
    kept = {0}
    for leaf in leaves:
        while leaf not in kept:
            kept.add(leaf)
            leaf = tree.parents[leaf]
    places = {old: new for new, old in enumerate(sorted(kept))}
    return Tree([tree.tokens[old] for old in places], [places.get(tree.parents[old], -1) for old in places])
