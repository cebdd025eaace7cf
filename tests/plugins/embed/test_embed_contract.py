"""What is promised of `embed`."""

from __future__ import annotations

import logging

import pytest

import ptrain
from ptrain.testing import contract

test_embed = contract("trainer", "embed")


@pytest.mark.parametrize(("kind", "told"), [("huggingface", True), ("sentence-transformers", False)])
def test_a_checkpoint_of_the_body_alone_is_told_of(kind: str, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Such a folder has no pooling."""
    model = {"config": {"model_type": "bert"}, "dtype": "fp32"}
    data = {"sources": [{"type": "jsonl", "path": "pairs.jsonl"}]}
    run = ptrain.open_recipe({"type": "embed", "model": model, "data": data, "checkpoint": [{"type": kind}]})
    with caplog.at_level(logging.WARNING, "ptrain"):
        run.call("on_start")
    assert ("saves the body of an embedding model alone" in caplog.text) == told
