"""The evaluator `speculative`, in real runs and by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptrain import RecipeError, TrainingError
from ptrain.testing import contract
from ptrain_spec_decode.cached import Cached
from ptrain_spec_decode.decode import Limit, Written, speculative_greedy
from ptrain_spec_decode.evaluator import Pair, check_same, metrics, prompts
from ptrain_spec_decode.layout import Shape
from ptrain_spec_decode.saved import load_into
from ptrain_spec_decode.speculator import make

WIDTH, NEW = 32, 12
ROWS = """
import json

import ptrain


@ptrain.hookimpl
def on_end(run):
    if run.rank == 0:
        rows = [{name: list(map(int, row[name])) for name in row} for row in run.eval_data]
        (run.dir / "rows.json").write_text(json.dumps(rows))
"""

test_evaluator = contract("evaluator", "speculative", {"type": "spec-decode", "model": {"speculator_width": WIDTH}})


@pytest.fixture(scope="module")
def recipe(ptrain_recipe: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def make_recipe(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
        base = ptrain_recipe("spec-decode", rows="conversations", model={"speculator_width": WIDTH}, train_iters=2)
        base["data"] = {**base["data"], "train_eval_split": [0.6, 0.4]}
        base["checkpoint"] = [{"type": "speculator", "save_end_of_training": True}]
        base["evaluation"] = [{"type": "speculative", "count": 5, "max_new_tokens": NEW, **settings}]
        return {**base, **changes}

    return make_recipe


def test_measures_what_decoding_by_hand_does(recipe: Any, ptrain_run: Any, ptrain_model: Path, tmp_path: Path) -> None:
    """On one worker, and on two that share the weights and have not as many prompts."""
    code = tmp_path / "rows.py"
    code.write_text(ROWS)
    tree = {"candidates": [3, 2, 2], "paths": 4}
    run = ptrain_run(recipe(tree), code=code)
    (found,) = run.evaluations
    base = AutoModelForCausalLM.from_pretrained(ptrain_model, dtype=torch.float32).eval()
    heads = make(Shape("mlp", 64, base.config.vocab_size, inner=(WIDTH,), proj=(WIDTH,), emb=(WIDTH,)))
    load_into(heads, run.dir / "speculator" / "latest")
    rows = json.loads((run.dir / "rows.json").read_text())
    eos = base.generation_config.eos_token_id
    pairs = []
    for prompt in prompts(rows, 5, 64, 512):
        one = speculative_greedy(Cached(base), heads, prompt, Limit(NEW, {eos}), (3, 2, 2), 4)
        pairs.append(Pair(prompt, one, one))
    expected = metrics(pairs, 3)
    for name in ("tokens_per_pass", "acceptance_length", "prompt_lookup"):
        total, count = expected[f"speculative/{name}"]
        assert found[f"eval/speculative/{name}"] == pytest.approx(total / count)
    assert found["eval/speculative/speed_up"] > 0
    zero3 = {"zero_optimization": {"stage": 3}}
    two = ptrain_run(recipe(tree, micro_batch_size=2, deepspeed=zero3), workers=2)
    for name in ("tokens_per_pass", "acceptance_length", "prompt_lookup"):
        assert two.evaluations[0][f"eval/speculative/{name}"] == pytest.approx(found[f"eval/speculative/{name}"])


def test_samples_where_there_is_a_temperature(recipe: Any, ptrain_run: Any) -> None:
    (found,) = ptrain_run(recipe({"temperature": 0.8, "top_k": 5, "count": 2})).evaluations
    assert 1 <= found["eval/speculative/acceptance_length"] <= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1.0, "candidates": [2, 1]}, "sampling takes a chain"),
        ({"top_k": 5}, "`top_k` needs a `temperature`"),
        ({"candidates": [0]}, "candidates"),
    ],
)
def test_bad_settings(recipe: Any, ptrain_run: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ptrain_run(recipe(settings))


def test_more_candidates_than_heads(recipe: Any, ptrain_run: Any) -> None:
    with pytest.raises(Exception, match=r"`candidates: \[1, 1, 1, 1\]`.*does not fit the speculator"):
        ptrain_run(recipe({"candidates": [1, 1, 1, 1]}))


def test_another_text_is_an_error() -> None:
    plain = Written([1, 2, 3], 3)
    check_same(plain, Written([1, 2, 3], 2), [7])
    check_same(plain, Written([1, 5, 6], 2, near_ties=[1]), [7])
    for wrong in (Written([1, 5, 3], 2), Written([1, 5, 3], 2, near_ties=[2]), Written([1, 2], 2)):
        with pytest.raises(TrainingError, match="another text than plain greedy decoding"):
            check_same(plain, wrong, [7])


def test_prompts_are_questions_or_beginnings() -> None:
    chat = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, -100, 5], "document_lengths": [5]}
    text = {"input_ids": [*range(20)], "labels": [*range(20)], "document_lengths": [14, 6]}
    assert prompts([chat, text], 9, 8, 100) == [[1, 2, 3, 4], [*range(7)], [14, 15, 16]]
    assert prompts([text], 9, 4, 100) == [[0, 1, 2, 3], [14, 15, 16]]
    assert prompts([chat, text], 1, 8, 100) == [[1, 2, 3, 4]]
    assert prompts([chat], 9, 8, 4) == []


def test_metrics_are_sums_and_counts() -> None:
    plain = Written([1, 2, 1, 2, 1, 2], 6, seconds=6.0)
    drafted = Written([1, 2, 1, 2, 1, 2], 3, taken=[3, 0], near_ties=[4], seconds=2.0)
    assert metrics([Pair([9], plain, drafted)] * 2, 3) == {
        "speculative/tokens_per_pass": (12.0, 6.0),
        "speculative/acceptance_length": (10.0, 4.0),
        "speculative/prompt_lookup": (12.0, 8.0),  # 1, 2 and the second 1 alone, then 2 and 1 are copied
        "speculative/speed_up": (12.0, 4.0),
        "speculative/near_ties": (2.0, 12.0),
    }
