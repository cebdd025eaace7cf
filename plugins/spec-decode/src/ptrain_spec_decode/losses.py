"""The loss of a speculator, and how often its heads are right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

import ptrain
from ptrain_spec_decode.acceptance import acceptance_length
from ptrain_spec_decode.targets import IGNORED, LABELS, TOKENS

if TYPE_CHECKING:
    from ptrain import Batch, Loss, Run
    from ptrain_spec_decode.speculator import Speculator


def still(model: Any) -> None:
    """Take the dropout out of the base, which is asked and not trained."""
    if model.base_model.training:
        model.base_model.eval()


def base_states(run: Run, batch: Batch) -> torch.Tensor:
    """The base's last hidden states, [b, s, h], without a gradient and without dropout."""
    still(run.model)
    with torch.no_grad():
        return run.call("forward", model=run.model, batch=batch)


def heads_loss(run: Run, hidden: torch.Tensor, batch: Batch, *, measure: bool) -> Loss:
    """Minus the log-probability of the targets, a term for each head.

    Args:
        hidden: of the base, [b, s, h].
        batch: with the tensors of `with_targets`.
        measure: give the accuracy of each head and the acceptance length, too.
    """
    from ptrain_spec_decode.model import speculator_of

    speculator = speculator_of(run)
    where = (batch[LABELS] != IGNORED).any(-1)
    # One row of the positions at which some head has a target.
    tokens, labels = batch[TOKENS][where][None], batch[LABELS][where][None]
    sums, hits = {}, []
    for i, state in enumerate(states(speculator, hidden[where][None], tokens)):
        own, head = labels[..., i].contiguous(), speculator.head(i)
        sums[term(i)] = -run.call("token_logprobs", hidden=state, labels=own, head=head).sum()
        if measure:
            hits.append(run.call("token_argmax", hidden=state.detach(), labels=own, head=head) == own)
    return ptrain.Loss(sums, metrics=measured(torch.stack(hits, -1), labels) if measure else {})


def states(speculator: Speculator, hidden: torch.Tensor, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """What each head reads, [..., d], from the base's `hidden` [..., h], given `tokens`, int64 [..., heads]."""
    state = speculator.begin(hidden)
    for i in range(speculator.n_predict):
        state = speculator.advance(state, tokens[..., i], i)
        yield state.hidden


def term(head: int) -> str:
    """What the loss of a head is called; for people they count from 1."""
    return f"head{head + 1}"


def measured(hits: torch.Tensor, labels: torch.Tensor) -> dict[str, tuple[Any, float]]:
    """Sums and counts: of right tokens by head, and of the tokens that a pass of the base would yield.

    Args:
        hits: whether each head names the target, bool [..., heads].
        labels: the targets; int64 [..., heads].
    """
    there = labels != IGNORED
    right = hits & there
    found: dict[str, tuple[Any, float]] = {}
    for i in range(labels.shape[-1]):
        found[f"accuracy/{term(i)}"] = (right[..., i].sum(), float(there[..., i].sum()))
    # Near the end of a document no head could be wrong any more.
    found["acceptance_length"] = acceptance_length(right[there.all(-1)])
    return found
