"""Losses of pairs, from log-probabilities of whole completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of the completions of n pairs, each fp32 [n]: sums over the tokens, or means over them.

    Attributes:
        chosen, rejected: under the model that is trained.
        reference_chosen, reference_rejected: under the reference; 0 where there is none.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor

    @property
    def margin(self) -> torch.Tensor:
        """How much more the model prefers the chosen one than the reference does: the difference of log-ratios."""
        return (self.chosen - self.reference_chosen) - (self.rejected - self.reference_rejected)


def sigmoid(pairs: Pairs, beta: float, label_smoothing: float) -> torch.Tensor:
    """The loss of each pair, [n]: -(1 - e) log sigmoid(b m) - e log sigmoid(-b m), m the margin, e the smoothing.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; with e > 0 the conservative DPO of
    Mitchell 2023, "A note on DPO with noisy preferences", where e is the share of labels that are wrong.
    """
    scaled = beta * pairs.margin
    return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def ipo(pairs: Pairs, beta: float, label_smoothing: float) -> torch.Tensor:
    """The loss of each pair, [n]: (m - 1 / (2 b))^2, m the margin; it stops pushing where the margin is wide enough.

    Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    eq. 17, where b is called tau.
    """
    return (pairs.margin - 1 / (2 * beta)) ** 2


LOSSES = {"sigmoid": sigmoid, "ipo": ipo}
"""By name, as `loss_type` has it."""
