"""Hidden states taken on the way are those that transformers lists."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ptrain.errors import ModelError
from ptrain.model.between import Between

KEYS = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def made(family: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **KEYS))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_they_are_those_of_transformers(family: str, recomputed: bool) -> None:
    """With their gradients, whether or not the backward pass computes the layers again."""
    model = made(family).train()
    ids = torch.arange(11)[None] * 5 % 67
    every = torch.stack(model.base_model(input_ids=ids, output_hidden_states=True).hidden_states, dim=2)
    if recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    asked = [-2, 0, -1, 3, 1, -2]
    with Between(model, asked) as between:
        last = model.base_model(input_ids=ids).last_hidden_state
    found = between.stacked(last)
    assert found.equal(every[:, :, asked])
    weight = model.base_model.layers[0].self_attn.q_proj.weight
    one, other = (torch.autograd.grad(x.square().sum(), weight)[0] for x in (found, every[:, :, asked]))
    torch.testing.assert_close(one, other)


def test_none_are_taken_afterwards() -> None:
    model = made("llama")
    with Between(model, [1]):
        pass
    assert not any(layer._forward_pre_hooks for layer in model.base_model.layers)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no hidden state 4\n.*-4 to 3"):
        Between(made("llama"), [4])
    with pytest.raises(ModelError, match="GPT2LMHeadModel keeps its layers where they are not found"):
        Between(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_head=2, n_layer=1)), [0])
