"""An optimizer step as one contrastive batch, with the memory of one micro-batch: cached gradients.

All micro-batches are embedded without a gradient first. From the embeddings comes the loss of the whole batch and its
gradient with respect to each of them; then each micro-batch is embedded again, with a gradient, and passes on its own.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from ptrain.data.attached import Attached

if TYPE_CHECKING:
    from ptrain import Batch, Run
    from ptrain_embed.contrast import Contrast

Embed = Callable[["Run", "Batch"], torch.Tensor]
Compare = Callable[["Run", Sequence["Batch"], Sequence[torch.Tensor]], list["Contrast"]]
CONTRAST, RANDOM = "contrast", "random"
"""Keys of a batch: what the loss of the whole batch says of it, and where random numbers were when it was embedded."""


def cached(run: Run, batches: Sequence[Batch], embed: Embed, compare: Compare) -> list[Batch]:
    """The micro-batches with what the loss of all of them says of each; every worker must ask."""
    from ptrain.stages import to_device

    states, embeddings = [], []
    for batch in batches:
        on_device = run.call("prepare_batch", batch=to_device(batch, run.device))
        states.append(random_state(run.device))
        with torch.no_grad():
            embeddings.append(run.engine(lambda on_device=on_device: embed(run, on_device)))
    found = compare(run, batches, embeddings)
    return [
        {**batch, CONTRAST: one, RANDOM: state} for batch, one, state in zip(batches, found, states, strict=True)
    ]  # fmt: skip


class Windows(Attached):
    """A loader of which each `size` batches go through `attach` together."""

    def __init__(self, loader: Any, size: int, attach: Callable[[list[Batch]], list[Batch]]) -> None:
        super().__init__(loader, lambda batch: batch)
        self._size, self._together = size, attach

    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        while held := list(islice(batches, self._size)):
            yield from self._together(held)


def passed_on(run: Run, batch: Batch, embed: Embed, compare: Compare) -> tuple[torch.Tensor, Contrast]:
    """The loss of a micro-batch, with the gradient that the loss of the whole batch has for it.

    A micro-batch that is attached to nothing is, with those of the other workers, a batch of its own.
    """
    found = batch.get(CONTRAST)
    if found is not None and not torch.is_grad_enabled():
        return found.loss, found
    if found is not None:
        set_random_state(batch[RANDOM], run.device)  # the same dropout as the first time
    embeddings = embed(run, batch)
    if found is None:
        (found,) = compare(run, [batch], [embeddings])
    surrogate = (embeddings.float() * found.gradient).sum()
    return found.loss + surrogate - surrogate.detach(), found


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Where torch's random numbers are, on the CPU and on this device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(state: Sequence[torch.Tensor], device: torch.device) -> None:
    """Go back to where they were."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
