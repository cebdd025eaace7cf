"""What is promised of `spec-decode` and its parts."""

from __future__ import annotations

from ptrain.testing import contract

CELL = {"speculator": "lstm", "method": "sum_lstm", "speculator_tie_weights": True, "speculator_width": 32}

test_trainer = contract("trainer", "spec-decode", {"model": {"speculator_width": 32}})
test_model = contract("model", "speculator", {"type": "spec-decode", "model": CELL})
test_checkpoint = contract("checkpoint", "speculator", {"type": "spec-decode", "model": {"speculator_width": 32}})
