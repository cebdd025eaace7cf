"""From hidden states to logits, as the model itself does it: some families scale or cap what the output layer gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ptrain.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[torch.Tensor], torch.Tensor]
PROBE = 8
"""Tokens of the input on which both ways to the logits are compared."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far they may be apart, as a share of the largest logit."""


def output_head(model: PreTrainedModel) -> Head:
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
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = layer(hidden).float()
        if factor != 1.0:
            logits = logits * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    return head


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
