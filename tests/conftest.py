"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# A deadline would fail tests on a machine that is busy with something else.
settings.register_profile("ptrain", deadline=None)
settings.load_profile("ptrain")
