"""The plugin author's kit: a tiny model, data, recipes, real runs, and the contract of a plugin as tests.

Importing it imports neither pytest nor torch. pytest finds the fixtures by itself (`ptrain.testing.fixtures`).
"""

from __future__ import annotations

from ptrain.testing.contract import contract
from ptrain.testing.finished import Finished

__all__ = ["Finished", "contract"]
