"""What is promised of every feature."""

from __future__ import annotations

from ptrain.testing import contract

test_feature = contract("plugin", "sequence-parallel")
