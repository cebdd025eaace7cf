"""What is promised of plugins holds for core's own parts, one of each kind."""

from __future__ import annotations

from ptrain.testing import contract

test_model = contract("model", "huggingface")
test_source = contract("source", "jsonl")
test_tokenizer = contract("tokenizer", "train", {"tokenizer": {"vocab_size": 300}})
test_optimizer = contract("optimizer", "adamw")
test_scheduler = contract("scheduler", "wsd", {"scheduler": {"num_warmup_steps": 1, "num_decay_steps": 2}})
test_checkpoint = contract("checkpoint", "deepspeed")
test_tracker = contract("tracker", "jsonl", lambda folder: {"trackers": [{"type": "jsonl", "path": str(folder / "m")}]})
test_evaluator = contract("evaluator", "exact_match")
