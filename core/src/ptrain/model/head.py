"""From hidden states to logits, as the model itself does it: some families scale or cap what the output layer gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ptrain.engine import is_gathered_whole
from ptrain.errors import ModelError
from ptrain.weights import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[torch.Tensor], torch.Tensor]
PROBE = 8
"""Tokens of the input on which both ways to the logits are compared."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far they may be apart, as a share of the largest logit."""


@dataclass(frozen=True)
class OutputHead:
    """Maps hidden states [n, h] to logits [n, v] in fp32 or, where weights are, fp64.

    That is an output layer, and a factor or a cap in some families.
    """

    layer: Head
    factor: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits."""
        logits = self.layer(hidden)
        logits = logits.to(wide(logits.dtype))
        if self.factor != 1.0:
            logits = logits * self.factor
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits of a dtype are computed with: fp32, or fp64 where they are."""
    return torch.promote_types(dtype, torch.float32)


def output_head(model: PreTrainedModel) -> OutputHead:
    """Maps hidden states [n, h] to logits [n, v], fp32.

    Raises:
        ModelError: the model has no output layer.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings, so it gives no log-probabilities")
    config = model.config.get_text_config()
    factor = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        factor *= getattr(config, name, None) or 1.0
    factor /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return OutputHead(layer, factor, getattr(config, "final_logit_softcapping", None))  # a cap: Gemma


def frozen(head: Head) -> bool:
    """Whether no weight of `head` is trained."""
    layer = layer_of(head)
    return isinstance(layer, nn.Module) and not any(p.requires_grad for p in layer.parameters())


def sharded(head: Head) -> bool:
    """Whether ZeRO-3 gathers the weight of `head` at each call, so that workers have to call it equally often."""
    layer = layer_of(head)
    return isinstance(layer, nn.Module) and any(hasattr(p, "ds_tensor") for p in layer.parameters())


def layer_of(head: Head) -> Any:
    """The output layer of `head`, which may be one itself."""
    return head.layer if isinstance(head, OutputHead) else head


def repeatable(head: Head) -> bool:
    """Whether `at_once` makes `head` one that may be called any number of times."""
    layer = layer_of(head)
    return not sharded(head) or is_gathered_whole(layer) or not any(True for _ in layer.children())


def at_once(head: Head, states: torch.Tensor, work: Callable[[Head, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`work(head, states)`, during which a sharded `head` is gathered; so it is once more in its backward pass.

    The output layer is called once, with `work` in the place of its own forward pass, whatever `work` calls. Every
    worker has to take part.
    """
    if not (sharded(head) and repeatable(head)):
        return work(head, states)
    layer = layer_of(head)
    own, before = layer.forward, vars(layer).get("forward")
    inner = replace(head, layer=own) if isinstance(head, OutputHead) else own
    layer.forward = lambda states: work(inner, states)
    try:
        return layer(states)
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def gathered(head: Head) -> Head | None:
    """`head` such that it may be called any number of times, for use without gradients of its weights.

    Where it is sharded its weight is gathered here, once, which every worker must ask for. None where that can't be
    done: then call `head` itself, once.
    """
    if not sharded(head):
        return head
    layer = layer_of(head)
    if type(layer) is not nn.Linear:
        return None
    bias = whole(layer.bias) if layer.bias is not None else None
    linear = functools.partial(nn.functional.linear, weight=whole(layer.weight), bias=bias)
    return replace(head, layer=linear) if isinstance(head, OutputHead) else linear


@torch.no_grad()
def check_head(model: PreTrainedModel, head: Head) -> None:
    """Raise ModelError where the model's own logits are others than those that `head` gives.

    Every worker takes part. The model is switched to evaluation for a moment: dropout would make both differ.
    """
    mode, device = model.training, model.device
    ids = (7 * torch.arange(PROBE, device=device)[None] + 1) % model.config.get_text_config().vocab_size
    model.eval()
    try:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found, expected = head(hidden[0]), model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        model.train(mode)
    difference, largest = (found - expected).abs().max(), expected.abs().max()
    if not difference <= TOLERANCE.get(model.dtype, 0.05) * largest:
        raise ModelError(
            f"{type(model).__name__} computes its logits in a way that is not known here: they differ by "
            f"{difference.item():.2g} from those of its output layer",
            fix="report this with the model's name; a plugin can answer the hook `token_logprobs` itself",
        )
