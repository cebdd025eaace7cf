"""Configuration of Sphinx."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "ptrain"
author = "the ptrain authors"
copyright = "the ptrain authors"
version = release = version_of("ptrain")

extensions = ["myst_parser", "ptrain_reference"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
smartquotes = False  # keys and values are to be copied
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"ptrain {release}"
