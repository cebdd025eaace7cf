"""A base that reads one text a few tokens at a time, keeps their keys and values, and forgets what was rejected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ptrain import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASKED = ("ptrain_sdpa", "ptrain_varlen", "sdpa", "eager")
"""Attention that takes any mask, which a tree of candidates needs."""
CROPPED = {"full_attention", "sliding_attention"}
"""Layers whose state at an earlier token can be had back."""


class Read(NamedTuple):
    """What the base makes of the tokens that it read.

    Attributes:
        hidden: its last hidden states, after its final norm, [n, h].
        logits: of the next token, [n, v]; of the last token alone, [1, v], where that was asked for.
    """

    hidden: torch.Tensor
    logits: torch.Tensor


class Cached:
    """A causal language model of transformers that reads one text.

    Attributes:
        model: in evaluation mode; nothing of it is changed.
        length: tokens that it has read and not forgotten.
        passes: forward passes so far.
    """

    def __init__(self, model: PreTrainedModel, before_pass: Callable[[], None] = lambda: None) -> None:
        """Begin with nothing read; `before_pass` is called before each forward pass.

        Raises:
            ModelError: it keeps a state that can't be taken back.
        """
        from transformers import DynamicCache

        check_forgets(model)
        self.model, self._before_pass = model, before_pass
        # Without the configuration, layers with a window keep what is outside of it too, so that all can be cropped.
        self._cache: Any = DynamicCache()
        self.length = self.passes = 0

    def read(
        self, tokens: Sequence[int], depths: Sequence[int] | None = None, seen: torch.Tensor | None = None,
        *, last: bool = False,
    ) -> Read:  # fmt: skip
        """Read `tokens`, one after another.

        Args:
            depths: or else as branches of a tree: how far below the first token each one stands.
            seen: which of them each one sees, bool [n, n].
            last: only the logits of the last one are needed.
        """
        self._before_pass()
        self.passes += 1
        device = self.model.device
        below = torch.arange(len(tokens)) if depths is None else torch.tensor(depths)
        extra: dict[str, Any] = {"logits_to_keep": 1} if last else {}
        if seen is not None:
            extra["attention_mask"] = self._mask(seen.to(device))
        with torch.no_grad(), last_hidden(self.model) as hidden:
            out = self.model(
                input_ids=torch.tensor([list(tokens)], device=device),
                position_ids=(self.length + below)[None].to(device),
                past_key_values=self._cache, use_cache=True, **extra,
            )  # fmt: skip
        self.length += len(tokens)
        return Read(hidden[0][0], out.logits[0])

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        """What to add to the scores, [1, 1, n, length + n]: all that was read before is seen."""
        before = torch.ones(len(seen), self.length, dtype=torch.bool, device=seen.device)
        hidden = ~torch.cat([before, seen], dim=1)
        scores = torch.zeros(hidden.shape, dtype=self.model.dtype, device=seen.device)
        return scores.masked_fill(hidden, torch.finfo(self.model.dtype).min)[None, None]

    def forget(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if count:
            self._cache.crop(-count)
            self.length -= count

    def keep(self, read: int, path: Sequence[int]) -> None:
        """Of the last `read` tokens keep those at `path`, in ascending order, and forget the others."""
        if list(path) != list(range(len(path))):
            first = self.length - read
            for layer in self._cache.layers:
                if layer.get_seq_length():  # layers that share those of another one have none
                    chosen = [first + at for at in path]
                    for states in (layer.keys, layer.values):
                        states[..., first : first + len(path), :] = states[..., chosen, :]
        self.forget(read - len(path))


@contextmanager
def last_hidden(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Within it, a list gets what the model's body gives in each forward pass: last hidden states [b, n, h]."""
    found: list[torch.Tensor] = []
    hook = model.base_model.register_forward_hook(lambda *call: found.append(call[-1].last_hidden_state))
    try:
        yield found
    finally:
        hook.remove()


def check_forgets(model: PreTrainedModel) -> None:
    """Raise ModelError where a layer keeps a state from which a rejected token can't be taken back."""
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - CROPPED
    if others:
        raise ModelError(
            f"{type(model).__name__} has layers of the kind {sorted(others)}, whose state can't be taken back to where "
            "it was before a rejected token",
            expected="attention over keys and values alone",
        )


def check_trees(model: PreTrainedModel, length: int) -> None:
    """Raise ModelError where the attention of `model` can't read a tree of candidates in a text of `length` tokens."""
    config = model.config.get_text_config()
    name = config._attn_implementation
    fix = "use a chain: one candidate for each head"
    if name not in MASKED:
        raise ModelError(f"the attention `{name}` can't read several candidates for one token", fix=fix)
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if windowed and window is not None and length > window:
        raise ModelError(
            f"a tree of candidates in a text of {length} tokens is longer than the window of {window} tokens that "
            f"layers of {type(model).__name__} see",
            fix=fix,
        )
