"""Batched sampling from the base with a KV cache, reproducible sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ptrain import HuggingFaceModel, ModelError
from ptrain.seeds import derived_seed
from ptrain_spec_decode.cached import last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Warp:
    """From logits to the distribution that is sampled from, as serving engines do it.

    Attributes:
        temperature: what logits are divided by; 0 is greedy.
        top_k: only the so many likeliest tokens; 0 for all.
        top_p: of these, only the fewest whose probabilities add up to it; 1 for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits: torch.Tensor) -> Choice:
        """The distribution over the tokens that may come, [..., v] to [..., k]."""
        size = logits.shape[-1]
        count = 1 if self.temperature == 0 else min(self.top_k or size, size)
        if count == size:
            tokens, found = torch.arange(size, device=logits.device).expand(logits.shape), logits
        else:
            # In the order of the vocabulary: it stays where rounding swaps two tokens that are as likely.
            tokens = logits.topk(count).indices.sort().values
            found = logits.gather(-1, tokens)
        probabilities = (found.double() / (self.temperature or 1.0)).softmax(-1)
        return Choice(tokens, probabilities if self.top_p >= 1 else nucleus(probabilities, self.top_p))


class Choice(NamedTuple):
    """A distribution over some tokens.

    Attributes:
        tokens: int64 [..., k], ascending.
        probabilities: float64 [..., k].
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor

    def draw(self, uniforms: torch.Tensor) -> torch.Tensor:
        """The tokens at which the cumulative probability exceeds `uniforms`, float64 [...] below 1; int64 [...]."""
        whole = self.probabilities.cumsum(-1)
        at = torch.searchsorted(whole / whole[..., -1:], uniforms[..., None].contiguous(), right=True)
        return self.tokens.gather(-1, at).squeeze(-1)

    def dense(self, size: int) -> torch.Tensor:
        """Probabilities of all tokens of a vocabulary, float64 [..., size]."""
        shape = (*self.probabilities.shape[:-1], size)
        return self.probabilities.new_zeros(shape).scatter(-1, self.tokens, self.probabilities)


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Only the fewest probabilities that add up to `top_p`, normalised again; the others are 0."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    kept = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))
    return kept / kept.sum(-1, keepdim=True)


def uniforms(seed: int, samples: Sequence[int | str], count: int) -> torch.Tensor:
    """`count` draws from [0, 1) for each sample, float64 [samples, count]: those of a sample depend on `seed` and it
    alone, whatever it is drawn together with.

    Source: the counter-based generator Philox (Salmon et al. 2011), with a key for each sample.
    """
    keys = [derived_seed(seed, "sample", sample) for sample in samples]
    drawn = [np.random.Generator(np.random.Philox(key=key)).random(count) for key in keys]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.empty(0, count, dtype=torch.float64)


class Generated(NamedTuple):
    """What the base wrote.

    Attributes:
        tokens: int64 [b, n].
        hidden: its last hidden states, after the final norm, that made it choose each token, [b, n, h].
        last: the last token of each prompt, int64 [b].
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    last: torch.Tensor


def generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], draws: torch.Tensor, warp: Warp) -> Generated:
    """As many tokens after each prompt as `draws` [b, n] has columns, whatever they are: nothing ends a text.

    Always n forward passes, so that workers that share weights stay together. Call it with the model in evaluation
    mode. A token depends on its prompt and on the draws of its row alone, but for rounding: products of matrices of
    another size, as with another batch or other padding, are added up in another order. In fp32 the probabilities then
    differ by about 1e-6, and so does the chance that a token does; in bf16 by about 1e-2. With the same rows in the
    same batch the result is the same, bit for bit.
    """
    from transformers import DynamicCache

    device, count = model.device, draws.shape[1]
    ids, extra = _padded(prompts, device)
    cache: Any = DynamicCache(config=model.config)
    tokens = torch.empty(len(prompts), count, dtype=torch.int64, device=device)
    states: list[torch.Tensor] = []
    draws, read = draws.to(device), ids
    with torch.no_grad():
        for at in range(count):
            with last_hidden(model) as hidden:
                out = model(input_ids=read, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
            states.append(hidden[0][:, -1])
            tokens[:, at] = warp(out.logits[:, -1]).draw(draws[:, at])
            read, extra = tokens[:, at : at + 1], _next(extra)
    return Generated(tokens, torch.stack(states, dim=1), ids[:, -1])


def refuse_beyond_positions(model: PreTrainedModel, prompt: int, count: int, keys: str) -> None:
    """Raise ModelError where `model` has learnt fewer positions than it reads of a prompt and `count` tokens after it.

    Args:
        keys: what to lower.
    """
    limit = HuggingFaceModel.learnt_positions(model)
    # The last token is written and not read.
    if limit is not None and prompt + count - 1 > limit:
        raise ModelError(
            f"{count} tokens are to be written after prompts of up to {prompt}, and the base has learnt {limit} "
            "positions",
            fix=f"lower {keys}",
        )


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prompts padded on the left, int64 [b, s], with mask and positions where they are of different lengths."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids, {}
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _next(extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mask and positions for one more token."""
    if not extra:
        return extra
    mask = extra["attention_mask"]
    return {
        "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1),
        "position_ids": extra["position_ids"][:, -1:] + 1,
    }
