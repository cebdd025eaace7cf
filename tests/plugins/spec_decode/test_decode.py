"""Speculative decoding writes what the base alone writes: every token of greedy decoding, and the distribution of samples."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3NextConfig

from ptrain import ModelError
from ptrain_spec_decode.cached import Cached
from ptrain_spec_decode.candidates import Tree, draft
from ptrain_spec_decode.decode import Limit, accept, greedy, sample, speculative_greedy, speculative_sample
from ptrain_spec_decode.layout import Shape
from ptrain_spec_decode.sampling import Warp, uniforms
from ptrain_spec_decode.speculator import Speculator, make

VOCABULARY, WIDTH = 48, 32
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "head_dim": 8,
}  # fmt: skip


def base(dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 8.0, **changes: Any) -> Any:
    """A random model, with an output layer that is large enough for its text not to be one token again and again."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    model.lm_head.weight.data *= scale
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 8
    return model


def speculator(kind: str = "mlp", dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY) -> Speculator:
    """A random one."""
    keys: dict[str, Any] = {"kind": "mlp"}
    if kind != "mlp":
        keys = {"kind": "lstm", "method": kind, "tie_weights": True}
    torch.manual_seed(1)
    found = make(Shape(hidden_size=WIDTH, vocab_size=vocabulary, inner=(24,), proj=(24,), emb=(24,), **keys))
    found.initialise()
    return found.to(dtype)


def copying(model: Any) -> Any:
    """Makes the next token of `model` depend on the last one alone, and a speculator that knows which."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    follows = model(torch.arange(VOCABULARY)[:, None]).logits[:, 0].argmax(-1)
    shape = Shape("mlp", WIDTH, VOCABULARY, inner=(VOCABULARY,), proj=(VOCABULARY,), emb=(VOCABULARY,))
    found: Any = make(shape)
    for head in range(3):
        found.proj[head].weight.data.zero_()
        found.emb[head].weight.data.copy_(torch.eye(VOCABULARY))
        found.head(head).weight.data.zero_()
        found.head(head).weight.data[follows, torch.arange(VOCABULARY)] = 1.0
    return found.to(model.dtype)


def prompts(count: int) -> list[list[int]]:
    """Of 1 to 12 tokens."""
    rng = random.Random(0)
    return [rng.choices(range(VOCABULARY), k=rng.randint(1, 12)) for _ in range(count)]


CANDIDATES: dict[str, Any] = {
    "chain": {"top_k": (1, 1, 1)}, "one head": {"top_k": (1,)}, "tree": {"top_k": (3, 2, 2)},
    "paths": {"top_k": (5, 4, 3), "paths": 5},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["mlp", "sum_rnn", "sum_lstm"])
def test_greedy_token_for_token(dtype: torch.dtype, kind: str) -> None:
    model, heads, varied = base(dtype), speculator(kind, dtype), set()
    for number, prompt in enumerate(prompts(8)):
        limit = Limit(20 + number)
        expected = greedy(Cached(model), prompt, limit)
        assert expected.passes == len(expected.tokens) == limit.tokens
        varied.update(expected.tokens)
        for candidates in CANDIDATES.values():
            found = speculative_greedy(Cached(model), heads, prompt, limit, **candidates)
            assert found.tokens == expected.tokens
    assert len(varied) > 8  # the texts say something


def nearly_tied(model: Any, difference: float) -> Any:
    """`model` with an output layer in which each two tokens are nearly, or quite, the same."""
    weight = model.lm_head.weight.data
    noise = difference * torch.randn(weight[1::2].shape, generator=torch.Generator().manual_seed(2))
    weight[1::2] = weight[0::2] * (1 + noise)
    return model


@pytest.mark.parametrize("difference", [0.0, 1e-7, 1e-6])
def test_near_ties_are_decided_as_plain_decoding_does(difference: float) -> None:
    model, heads = nearly_tied(base(), difference), speculator()
    ties = 0
    for prompt in prompts(10):
        expected = greedy(Cached(model), prompt, Limit(24))
        for candidates in (CANDIDATES["chain"], CANDIDATES["tree"]):
            found = speculative_greedy(Cached(model), heads, prompt, Limit(24), **candidates)
            assert found.tokens == expected.tokens
            ties += len(found.near_ties)
    assert ties > 100


def test_half_precision_differs_at_near_ties_alone() -> None:
    model, heads = base(torch.bfloat16), speculator(dtype=torch.bfloat16)
    exact = 0
    for prompt in prompts(10):
        expected = greedy(Cached(model), prompt, Limit(24)).tokens
        found = speculative_greedy(Cached(model), heads, prompt, Limit(24), (1, 1, 1))
        differ = [at for at, (one, other) in enumerate(zip(found.tokens, expected, strict=True)) if one != other]
        exact += not differ
        assert not differ or differ[0] in found.near_ties
        again = speculative_greedy(Cached(model), heads, prompt, Limit(24), (1, 1, 1), exact=True)
        assert again.tokens == expected
    assert exact


@pytest.mark.parametrize("candidates", CANDIDATES.values(), ids=CANDIDATES)
def test_a_speculator_that_copies_the_base_is_always_taken(candidates: dict[str, Any]) -> None:
    model = base()
    heads, depth = copying(model), len(candidates["top_k"])
    for prompt in prompts(5):
        found = speculative_greedy(Cached(model), heads, prompt, Limit(1 + 5 * (depth + 1)), **candidates)
        assert found.tokens == greedy(Cached(model), prompt, Limit(1 + 5 * (depth + 1))).tokens
        assert (found.taken, found.passes) == ([depth] * 5, 6)


def test_a_text_ends_with_its_stop_token() -> None:
    model = base()
    heads = copying(model)
    whole = greedy(Cached(model), [3, 4], Limit(30)).tokens
    stop = whole[4]
    end = whole.index(stop) + 1
    limit = Limit(30, {stop})
    assert greedy(Cached(model), [3, 4], limit).tokens == whole[:end]
    assert speculative_greedy(Cached(model), heads, [3, 4], limit, (1, 1, 1)).tokens == whole[:end]


def test_windows_and_soft_caps() -> None:
    """Gemma 2: logits are capped, and every other layer sees the last tokens alone."""
    keys = {**SIZES, "sliding_window": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**keys), attn_implementation="eager").eval()
    model.lm_head.weight.data *= 50
    for prompt in prompts(4):
        expected = greedy(Cached(model), prompt, Limit(24)).tokens
        assert speculative_greedy(Cached(model), speculator(), prompt, Limit(24), (1, 1, 1)).tokens == expected
    with pytest.raises(ModelError, match="longer than the window of 8 tokens"):
        speculative_greedy(Cached(model), speculator(), [1, 2], Limit(24), (2, 1))


def test_states_that_cannot_be_taken_back_are_refused() -> None:
    keys = {**SIZES, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "linear_num_value_heads": 2,
            "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 4}  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3NextConfig(**keys))
    with pytest.raises(ModelError, match="linear_attention"):
        Cached(model)


def test_attention_without_masks_reads_no_tree() -> None:
    model = base()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"flash_attention_2.*several candidates"):
        speculative_greedy(Cached(model), speculator(), [1, 2], Limit(8), (2, 1, 1))


def test_trees_against_all_paths() -> None:
    """The tree has the likeliest tokens of each head below each other, and keeps the best of all paths."""
    heads, hidden, top_k = speculator().requires_grad_(False), torch.randn(WIDTH), (3, 2, 2)
    scores: dict[tuple[int, ...], float] = {}
    for ranks in itertools.product(*map(range, top_k)):
        state, last, path, score = heads.begin(hidden), torch.tensor(7), [], 0.0
        for at, rank in enumerate(ranks):
            state = heads.advance(state, last, at)
            found = heads.head(at)(state.hidden).log_softmax(-1).topk(top_k[at])
            last = found.indices[rank]
            path, score = [*path, int(last)], score + float(found.values[rank])
        scores[tuple(path)] = score

    def leaves(tree: Tree) -> set[tuple[int, ...]]:
        paths: list[tuple[int, ...]] = []
        for at, parent in enumerate(tree.parents):
            paths.append((*(paths[parent] if parent >= 0 else ()), tree.tokens[at]))
        return {path[1:] for path in paths if len(path) == 4}

    whole = draft(heads, hidden, 7, top_k)
    assert leaves(whole) == set(scores) and len(whole.tokens) == 1 + 3 + 6 + 12
    assert not whole.is_chain and draft(heads, hidden, 7, (1, 1)).is_chain
    best = sorted(scores, key=lambda path: -scores[path])[:5]
    assert leaves(draft(heads, hidden, 7, top_k, paths=5)) == set(best)
    seen = whole.seen()
    for at, parent in enumerate(whole.parents):
        above = [] if parent < 0 else seen[parent].nonzero().flatten().tolist()
        assert seen[at].nonzero().flatten().tolist() == sorted({*above, at})


# Sampling


def chi_square(counts: Counter[Any], expected: dict[Any, float]) -> float:
    """In standard deviations from what it is by chance; cells with fewer than five expected are taken together."""
    total, statistic, cells = sum(counts.values()), 0.0, 0
    rare = {key for key, p in expected.items() if p * total < 5}
    for keys in [*([key] for key in expected if key not in rare), rare]:
        wanted = total * sum(expected[key] for key in keys)
        if wanted > 0:
            statistic += (sum(counts[key] for key in keys) - wanted) ** 2 / wanted
            cells += 1
    assert cells > 10
    return (statistic - (cells - 1)) / (2 * (cells - 1)) ** 0.5


SMALL = 5
WARPS = [Warp(), Warp(0.7, top_k=3), Warp(1.3, top_p=0.8)]


def text_probabilities(model: Any, warp: Warp) -> dict[tuple[int, ...], float]:
    """Of every text of four tokens after the prompt 0 1."""
    texts = list(itertools.product(range(SMALL), repeat=4))
    ids = torch.tensor([(0, 1, *text) for text in texts])
    with torch.no_grad():
        steps = warp(model(ids).logits[:, 1:-1]).dense(SMALL).gather(-1, ids[:, 2:, None]).squeeze(-1)
    found = dict(zip(texts, steps.prod(1).tolist(), strict=True))
    assert abs(sum(found.values()) - 1) < 1e-9
    return found


def written(model: Any, warp: Warp, count: int) -> tuple[Counter[Any], list[int]]:
    """How often each text was written, and how many drafts were taken."""
    heads, found, taken = speculator(vocabulary=SMALL), Counter(), []
    for number in range(count):
        draws = iter(uniforms(3, [number], 16)[0].tolist())
        one = speculative_sample(Cached(model), heads, [0, 1], Limit(4), warp, draws)
        found[tuple(one.tokens)] += 1
        taken += one.taken
    return found, taken


@pytest.mark.parametrize("warp", WARPS, ids=repr)
def test_samples_have_the_distribution_of_the_base(warp: Warp) -> None:
    """Texts of four tokens from a vocabulary of five: all 625 probabilities are known."""
    model = base(vocab_size=SMALL, num_hidden_layers=1, scale=8.0)
    expected = text_probabilities(model, warp)
    found, taken = written(model, warp, 1200)
    assert set(found) <= {text for text, p in expected.items() if p > 0}
    assert chi_square(found, expected) < 3.5
    assert min(taken) == 0 and max(taken) == 2


def taken_always(real: Any, guesses: Any, drafted: Any, draws: Any) -> tuple[int, int]:
    """Wrong: whatever is drafted."""
    return accept(torch.stack([*guesses, real[-1]]), guesses, drafted, draws)


def drawn_anew(real: Any, guesses: Any, drafted: Any, draws: Any) -> tuple[int, int]:
    """Wrong: after a rejection, from the whole of the base's distribution."""
    taken, token = accept(real, guesses, drafted, draws)
    if taken == len(drafted):
        return taken, token
    return taken, int((real[taken].cumsum(0) <= next(draws)).sum().clamp(max=SMALL - 1))


@pytest.mark.parametrize("wrong", [taken_always, drawn_anew])
def test_the_distribution_would_show_a_wrong_acceptance(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptrain_spec_decode.decode.accept", wrong)
    model = base(vocab_size=SMALL, num_hidden_layers=1, scale=8.0)
    assert chi_square(written(model, Warp(), 1000)[0], text_probabilities(model, Warp())) > 8


def test_plain_samples_are_drawn_by_the_inverse_distribution() -> None:
    model = base(vocab_size=5, num_hidden_layers=1, scale=2.0)
    with torch.no_grad():
        real = model(torch.tensor([[0, 1]])).logits[0, -1].double().softmax(-1)
    draws = [0.0, 0.2, 0.5, 0.8, 0.999999]
    found = [sample(Cached(model), [0, 1], Limit(1), Warp(), iter([draw])).tokens[0] for draw in draws]
    assert found == [int((real.cumsum(0) <= draw).sum()) for draw in draws]


def test_acceptance_is_one_where_the_draft_is_the_base() -> None:
    real = torch.tensor([[0.2, 0.3, 0.5]] * 3, dtype=torch.float64)
    draws = itertools.cycle([0.9999999])
    assert accept(real, list(real[:2]), [0, 2], draws) == (2, 2)
    assert accept(real, list(real[:2]), [0, 2], itertools.cycle([0.0])) == (2, 0)


def test_a_draft_that_the_base_never_writes_is_rejected() -> None:
    real = torch.tensor([[0.0, 0.4, 0.6], [1.0, 0.0, 0.0]], dtype=torch.float64)
    guess = torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64)
    assert accept(real, [guess], [0], iter([0.0, 0.0])) == (0, 1)


def test_sampling_with_temperature_zero_is_greedy() -> None:
    model, heads = base(), speculator()
    for prompt in prompts(4):
        draws = itertools.cycle([0.3])
        found = speculative_sample(Cached(model), heads, prompt, Limit(16), Warp(0.0), draws)
        assert found.tokens == greedy(Cached(model), prompt, Limit(16)).tokens
