"""Greedy generation takes the likeliest token, whatever else is written beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptrain.model.generate import greedy


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 1, "max_time": 1e-9}])
def test_the_likeliest_token_is_taken(settings: dict[str, Any], ptrain_model: Path) -> None:
    """Published models come with settings for sampling; transformers would go by those of them that greed allows."""
    tokenizer = AutoTokenizer.from_pretrained(ptrain_model)
    model = AutoModelForCausalLM.from_pretrained(ptrain_model).eval()
    model.generation_config.update(**settings)
    prompts, kept = [[5, 6, 7, 8, 9], [20, 21]], model.generation_config
    found = greedy(model, tokenizer, prompts, 8, torch.device("cpu"), [2], synchronised=False)
    for prompt, made in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in made:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
        assert len(made) == 8
    assert model.generation_config is kept
