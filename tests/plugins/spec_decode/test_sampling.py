"""Samples of the base: their distribution, and that each depends on its own prompt and draws alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from ptrain_spec_decode.sampling import Warp, generate, nucleus, uniforms

VOCABULARY = 40


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    found = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    found.lm_head.weight.data *= 6
    return found


def prompts(count: int, longest: int = 9) -> list[list[int]]:
    rng = random.Random(1)
    return [rng.choices(range(VOCABULARY), k=rng.randint(1, longest)) for _ in range(count)]


@pytest.mark.parametrize("warp", [Warp(), Warp(0.7, top_k=5), Warp(1.0, top_p=0.6), Warp(0.0)], ids=repr)
def test_like_sampling_token_by_token_without_a_cache(model: Any, warp: Warp) -> None:
    """Prompts of many lengths in one batch, against each by itself, with everything read anew for each token."""
    asked, count = prompts(6), 8
    draws = uniforms(5, range(6), count)
    found = generate(model, asked, draws, warp)
    assert found.tokens.shape == (6, count) and found.hidden.shape == (6, count, 32)
    assert found.last.tolist() == [prompt[-1] for prompt in asked]
    for row, text in enumerate(asked):
        text = list(text)
        for at in range(count):
            with torch.no_grad():
                out = model(torch.tensor([text]), output_hidden_states=True)
            torch.testing.assert_close(found.hidden[row, at], out.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-5)
            p = expected_distribution(out.logits[0, -1].double().numpy(), warp)
            text.append(int((p.cumsum() <= draws[row, at].item()).sum()))
        assert found.tokens[row].tolist() == text[-count:]


def expected_distribution(logits: np.ndarray, warp: Warp) -> np.ndarray:
    """By the book, with numpy."""
    if warp.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    p = np.exp((logits - logits.max()) / warp.temperature)
    if warp.top_k:
        p[p < np.sort(p)[-warp.top_k]] = 0
    p /= p.sum()
    if warp.top_p < 1:
        order = np.argsort(-p)
        inside = order[: int((p[order].cumsum() < warp.top_p).sum()) + 1]
        kept = np.zeros_like(p)
        kept[inside] = p[inside]
        p = kept / kept.sum()
    return p


def test_a_sample_is_the_same_in_any_batch(model: Any) -> None:
    asked, keys = prompts(12), [f"0/{row}/0" for row in range(12)]
    whole = generate(model, asked, uniforms(1, keys, 10), Warp(top_k=8)).tokens
    rng = random.Random(2)
    for _ in range(4):
        rows = rng.sample(range(12), rng.randint(1, 11))
        draws = uniforms(1, [keys[row] for row in rows], 10)
        part = generate(model, [asked[row] for row in rows], draws, Warp(top_k=8)).tokens
        assert torch.equal(part, whole[rows])
    assert not torch.equal(generate(model, asked, uniforms(2, keys, 10), Warp(top_k=8)).tokens, whole)


def test_nothing_ends_a_text(model: Any) -> None:
    """EOS is a token like any other: every text has the length that was asked for."""
    model.generation_config.eos_token_id = [*range(VOCABULARY)]
    assert generate(model, [[1, 2]], uniforms(0, ["a"], 5), Warp()).tokens.shape == (1, 5)


def test_draws_are_those_of_their_sample() -> None:
    some = uniforms(3, ["a", "b", 7], 50)
    assert some.dtype == torch.float64 and (some >= 0).all() and (some < 1).all()
    assert torch.equal(uniforms(3, ["b"], 50)[0], some[1])
    assert torch.equal(uniforms(3, ["b"], 20)[0], some[1, :20])  # a longer text begins with the shorter one
    assert not torch.equal(uniforms(4, ["b"], 50)[0], some[1])
    assert len({tuple(row) for row in some.tolist()}) == 3
    assert uniforms(3, [], 4).shape == (0, 4)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12, unique=True), st.floats(0, 1, exclude_max=True))
def test_no_draw_falls_on_what_is_impossible(logits: list[float], draw: float) -> None:
    for warp in (Warp(top_k=2), Warp(top_p=0.5), Warp(0.0), Warp(0.5)):
        choice = warp(torch.tensor(logits))
        token = int(choice.draw(torch.tensor(draw, dtype=torch.float64)))
        dense = choice.dense(len(logits))
        assert dense[token] > 0
        assert dense.sum().item() == pytest.approx(1)
        assert choice.tokens.tolist() == sorted(choice.tokens.tolist())


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    for warp in (Warp(), Warp(0.6), Warp(top_k=3), Warp(1.5, top_p=0.7)):
        choice = warp(logits.expand(40_000, 5))
        drawn = choice.draw(torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        p = torch.tensor(expected_distribution(logits.double().numpy(), warp))
        counts = torch.bincount(drawn, minlength=5)
        assert (counts[p == 0] == 0).all()
        statistic = ((counts - 40_000 * p) ** 2 / (40_000 * p))[p > 0].sum()
        assert statistic < 18.5  # chi-square with 4 degrees of freedom: one in a thousand


def test_nucleus_keeps_the_fewest() -> None:
    p = torch.tensor([0.1, 0.5, 0.4], dtype=torch.float64)
    assert nucleus(p, 0.5).tolist() == [0, 1, 0]
    assert nucleus(p, 0.51).tolist() == pytest.approx([0, 5 / 9, 4 / 9])
    assert nucleus(p, 1e-9).tolist() == [0, 1, 0]
