"""What is promised of `dpo`."""

from __future__ import annotations

from ptrain.testing import contract

test_dpo = contract("trainer", "dpo")
