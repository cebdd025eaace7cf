"""What is promised of `sft` and `causal`."""

from __future__ import annotations

from ptrain.testing import contract

test_sft = contract("trainer", "sft")
test_causal = contract("trainer", "causal")
