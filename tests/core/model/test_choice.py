"""Which attention is chosen, and what the log says of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptrain.model import choice
from ptrain.model.attention import NAME, implementation
from ptrain.model.choice import Place, attention, choose, failure, largest_head
from ptrain.model.varlen import VARLEN

HOPPER = Place("cuda", (9, 0), torch.bfloat16, 128, ("flash_attention_3", "flash_attention_2"), varlen=True)


@pytest.mark.parametrize(
    ("other", "name", "because"),
    [
        ({}, "flash_attention_3", "installed"),
        ({"flash": ("flash_attention_2",)}, "flash_attention_2", "installed"),
        ({"flash": ()}, VARLEN, "torch has a kernel for packed documents"),
        ({"flash": (), "dtype": torch.float16}, VARLEN, "torch has a kernel"),
        ({"flash": (), "varlen": False}, NAME, "neither flash-attn nor"),
        ({"dtype": torch.float32}, NAME, "bf16 and fp16 alone"),
        ({"capability": (7, 5)}, NAME, "older than flash attention"),
        ({"head": 512}, NAME, "heads have 512 numbers"),
        ({"device": "cpu"}, NAME, "the device is cpu"),
    ],
)
def test_the_fastest_that_is_exact_here(other: dict[str, Any], name: str, because: str) -> None:
    found = choose(NAME, dataclasses.replace(HOPPER, **other))
    assert found.name == name
    assert because in found.because


def test_a_model_with_masks_of_its_own_keeps_them() -> None:
    config = AutoConfig.for_model("qwen3_next")
    assert choose(implementation(config, "auto"), HOPPER).name == "sdpa"


@pytest.mark.parametrize("wanted", ["sdpa", "eager", "flex_attention", "flash_attention_2"])
def test_the_recipe_has_the_last_word(wanted: str) -> None:
    found = attention(AutoConfig.for_model("llama"), wanted, torch.bfloat16, torch.device("cpu"))
    assert found.name == (NAME if wanted == "sdpa" else wanted)
    assert f"the recipe says `{wanted}`" in found.because


@pytest.mark.parametrize(
    ("family", "keys", "size"),
    [
        ("llama", {"hidden_size": 64, "num_attention_heads": 4}, 16),
        ("qwen3", {"head_dim": 48}, 48),
        ("gpt2", {"n_embd": 64, "n_head": 2}, 32),
        ("gemma4_text", {"head_dim": 256, "global_head_dim": 512}, 512),
    ],
)
def test_the_largest_head(family: str, keys: dict[str, int], size: int) -> None:
    assert largest_head(AutoConfig.for_model(family, **keys)) == size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_what_is_chosen_on_this_gpu_can_be_made() -> None:
    """Transformers takes the name: nothing is chosen that it would refuse for want of a package."""
    config = AutoConfig.for_model(
        "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
    )
    found = attention(config, "auto", torch.bfloat16, torch.device("cuda", 0))
    AutoModelForCausalLM.from_config(config, attn_implementation=found.name, dtype=torch.bfloat16)


def tried(name: str) -> str | None:
    return failure(name, 16, torch.float32, torch.device("cpu"))


def test_a_kernel_is_tried_before_it_is_chosen() -> None:
    assert tried(NAME) is None
    assert tried("sdpa") is None  # transformers finds the documents by their positions
    assert "no_such_attention" in str(tried("no_such_attention"))


def test_a_kernel_that_lets_documents_see_each_other_is_not_chosen() -> None:
    def forgetful(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        """Causal attention over whole rows."""
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, query, key, value, None, scaling=kwargs["scaling"])

    ALL_ATTENTION_FUNCTIONS.register("forgetful", forgetful)
    ALL_MASK_ATTENTION_FUNCTIONS.register("forgetful", lambda *args, **kwargs: None)
    assert "off by" in str(tried("forgetful"))


def test_what_fails_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """This torch has no kernel for a CPU: what a GPU would choose is tried here, fails, and gives way."""
    place = dataclasses.replace(HOPPER, head=16)
    monkeypatch.setattr(choice, "_place", lambda *_: place)
    found = attention(AutoConfig.for_model("llama"), "auto", torch.bfloat16, torch.device("cpu"))
    assert found.name == NAME
    for name in (*place.flash, VARLEN):
        assert f"; {name} does not work here: " in found.because
