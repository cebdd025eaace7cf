"""Logits at label positions are those of the model itself, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ptrain.errors import ModelError
from ptrain.model.head import check_head, output_head
from ptrain.model.logprobs import token_logprobs

SMALL: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "phi3": {}, "olmo2": {}, "starcoder2": {}, "gpt2": {},
    "gpt_neox": {}, "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "gemma": {}, "gemma2": {"final_logit_softcapping": 0.5}, "gemma3_text": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.0625}, "cohere2": {"logit_scale": 0.25}, "granite": {"logits_scaling": 8.0},
    "mixtral": {"num_local_experts": 2}, "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def made(family: str, **keys: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **keys})).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_model(family: str) -> None:
    """Values and gradients, to 1e-5."""
    model = made(family, **FAMILIES[family]).eval()
    ids, labels = torch.randint(3, 67, (2, 11)), torch.randint(0, 67, (2, 11))
    labels[0, :4] = -100
    head = output_head(model)
    check_head(model, head)
    found = token_logprobs(head, model.base_model(input_ids=ids).last_hidden_state, labels, 5)
    logprobs = torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)
    expected = logprobs.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x.sum(), parameters, allow_unused=True) for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_model_with_another_way_to_its_logits_is_refused() -> None:
    """Rather than trained on other ones; the model's mode is as before."""
    model = made("llama").train()
    forward = model.forward

    def doubled(**kwargs: Any) -> Any:
        out = forward(**kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled
    with pytest.raises(ModelError, match="LlamaForCausalLM computes its logits in a way that is not known"):
        check_head(model, output_head(model))
    assert model.training


def test_a_model_without_an_output_layer() -> None:
    """Is named."""
    with pytest.raises(ModelError, match="LlamaModel has no output embeddings"):
        output_head(made("llama").base_model)
