"""What is promised of `embed`."""

from __future__ import annotations

from ptrain.testing import contract

test_embed = contract("trainer", "embed")
