"""MLPs in tiles compute what they compute whole; they are found by their structure, and others are named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiled_mlps
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_worker import peak
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ptrain.errors import ModelError
from ptrain.testing.workers import run_workers
from ptrain_sequence_parallel import mlp

SMALL: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = ["llama", "qwen2", "phi3", "olmo2", "starcoder2", "gpt2", "gpt_neox", "gemma2", "cohere", "granite", "phi"]
OTHERS = {
    "mixtral": "`mlp` (MixtralSparseMoeBlock), which holds Mixtral",
    "qwen3_moe": "`mlp` (Qwen3MoeSparseMoeBlock), which holds Qwen3Moe",
    "opt": "no module of its own for its MLP",
    "bloom": "no module of its own for its MLP",
}


def made(family: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    keys = {**SMALL, "num_local_experts": 2} if family == "mixtral" else SMALL
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys)).to(dtype)


def values(model: Any, dropout: float = 0.0) -> list[torch.Tensor]:
    """Hidden states, and gradients of all weights."""
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
    torch.manual_seed(1)
    ids = torch.randint(3, 67, (2, 11))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    weights = [p for p in model.base_model.parameters() if p.requires_grad]
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(w.grad for w in weights if w.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_whole(family: str) -> None:
    """In fp64 to 1e-10: two rows of 11 tokens, of which 5 are computed at a time."""
    model, said = made(family), []
    whole = copy.deepcopy(model)
    mlp.tile(model, 5, True, said.append)
    assert said == ["MLPs are computed 5 tokens at a time (2 of them)"]
    for one, other in zip(values(model), values(whole), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@settings(max_examples=25)
@given(tokens=st.integers(1, 40), rows=st.integers(1, 3), length=st.integers(1, 13), frozen=st.booleans())
def test_any_shape(tokens: int, rows: int, length: int, frozen: bool) -> None:
    """Whatever the tiles, with trained and frozen weights; with none of them, and without gradients."""
    model = made("llama")
    plain, tiled = (copy.deepcopy(model).requires_grad_(not frozen) for _ in range(2))
    mlp.tile(tiled, tokens, True, lambda line: None)
    drawn = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, length, 32, generator=drawn, dtype=torch.float64)
    found = []
    for one in (plain, tiled):
        x, layer = states.clone().requires_grad_(), one.model.layers[0].mlp
        out = layer(x)
        out.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), out)
        found.append([out, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_dropout_is_the_same_in_both_passes() -> None:
    """The gradient belongs to the values that were given, and random numbers go on as after one pass."""
    model = made("gpt2")
    mlp.tile(model, 3, True, lambda line: None)
    layer = model.base_model.h[0].mlp.train()
    layer.dropout.p = 0.5
    x = torch.randn(1, 10, 32, dtype=torch.float64, requires_grad=True)
    before = torch.get_rng_state()

    def computed(x: torch.Tensor) -> torch.Tensor:
        torch.set_rng_state(before)
        return layer(x)

    assert (computed(x) == 0).any()
    assert torch.autograd.gradcheck(computed, (x,))
    out = computed(x)
    after = torch.get_rng_state()
    out.sum().backward()
    assert torch.get_rng_state().equal(after)


def test_under_autocast() -> None:
    """The backward pass computes in the dtype of autocast as well."""
    model = made("llama", torch.float32)
    whole = copy.deepcopy(model)
    mlp.tile(model, 3, True, lambda line: None)
    found = []
    for one in (model, whole):
        x = torch.linspace(-1, 1, 320).view(1, 10, 32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = one.model.layers[0].mlp(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        found.append([out, x.grad])
    torch.testing.assert_close(found[0], found[1], atol=0.02, rtol=0.02)


def test_nothing_is_as_large_as_the_whole() -> None:
    """Both passes take a few tiles, and what goes in and comes out."""
    model = made("llama", torch.float32)
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 4096, 32, requires_grad=True)
    whole = peak(lambda: layer(x).sum().backward())
    mlp.tile(model, 32, True, lambda line: None)
    tiles = peak(lambda: layer(x).sum().backward())
    assert tiles < 3.5 * x.nbytes < whole / 2


@pytest.mark.parametrize(("checkpoint", "times"), [("kept", 2), ("non-reentrant", 2), ("reentrant", 3)])
def test_how_often_tiles_are_computed(checkpoint: str, times: int) -> None:
    """Once more in the backward pass. A layer that is computed again, too, stops where its MLP would begin, if it can."""
    model = tiled_mlps.made(False).train()
    tiled_mlps.keep(model, checkpoint)
    mlp.tile(model, tiled_mlps.TOKENS, True, lambda line: None)
    computed: list[int] = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, args, out: computed.append(out.shape[1]))
    tiled_mlps.loss(model, 0).backward()
    assert computed == [5, 5, 5, 5, 5, 5, 4] * times


def test_an_activation_that_looks_along_the_sequence() -> None:
    """Is no MLP, whatever its structure: it is tried."""
    model = made("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Softmax(dim=1)
    with pytest.raises(ModelError, match="LlamaMLP of LlamaForCausalLM looks like an MLP, and gives something else"):
        mlp.tile(model, 5, False, lambda line: None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", OTHERS)
def test_what_is_not_understood(family: str, device: str) -> None:
    """Is named: an error where tiles are asked for, before there are weights, and a line where they are not."""
    model, said = made(family, device=device), []
    with pytest.raises(ModelError) as error:
        mlp.check(model)
    assert OTHERS[family] in str(error.value) and "tiled_mlp: auto" in str(error.value)
    with pytest.raises(ModelError):
        mlp.tile(model, 5, True, said.append)
    mlp.tile(model, "auto", False, said.append)
    assert len(said) == 1 and OTHERS[family] in said[0]


def test_tiles_by_themselves() -> None:
    """As many tokens as a hidden state has numbers; on `meta`, where nothing can be tried, too."""
    said: list[str] = []
    model = made("llama", device="meta")
    mlp.check(model)
    mlp.tile(model, "auto", True, said.append)
    assert said == ["MLPs are computed 32 tokens at a time (2 of them)"]
    hidden = torch.empty(1, 100, 32, dtype=torch.float64, device="meta", requires_grad=True)
    model.model.layers[0].mlp(hidden).sum().backward()
    assert hidden.grad.shape == hidden.shape


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers made of each case."""
    folder = tmp_path_factory.mktemp("mlps")
    run_workers(tiled_mlps.train, folder, log=folder / "log", workers=tiled_mlps.WORKERS)
    return folder


@pytest.mark.parametrize("name", tiled_mlps.CASES)
def test_workers_with_unequal_tiles(learnt: Path, name: str) -> None:
    """Under ZeRO-3 each MLP is gathered equally often, however many tiles it has; and what is learnt is the same."""
    found, expected = load_file(learnt / f"{name}.safetensors"), tiled_mlps.expected(tiled_mlps.CASES[name])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
