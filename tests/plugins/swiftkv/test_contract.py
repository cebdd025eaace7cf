"""What is promised of `swiftkv`, the trainer and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swiftkv_made import make_teacher

from ptrain.testing import contract
from ptrain.testing.model import make_model


def recipe(folder: Path) -> dict[str, Any]:
    """A teacher of four layers: of two, a student would begin as the teacher, with nothing to learn."""
    tiny, teacher = folder / "tiny", folder / "teacher"
    if not teacher.exists():
        make_teacher(make_model(tiny), teacher)
    return {"model": {"name_or_path": str(teacher), "num_key_value_layers": 2, "key_value_group_size": 2}}


test_trainer = contract("trainer", "swiftkv", recipe=recipe)
test_model = contract("model", "swiftkv", recipe=recipe)
