"""The loaders of a run: core's pure sampler and collate, bound to this worker."""

from __future__ import annotations
