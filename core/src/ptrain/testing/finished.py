"""`Finished`: what a run has left."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Attributes:
        dir: the run directory.
        output: what was printed while it was prepared, and by rank 0.
    """

    dir: Path
    output: str

    @functools.cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Every line of the metrics: one a step, and one an evaluation, whose values begin with `eval/`."""
        text = (self.dir / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of each step, in order."""
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The metrics of each evaluation, in order."""
        return [line for line in self.lines if "loss" not in line]

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [line["loss"] for line in self.metrics]

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The exported weights by name.

        Raises:
            FileNotFoundError: the run exported no model.
        """
        from safetensors.torch import load_file

        folder = self.dir / "model" / "latest"
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"there is no export in `{folder}`: keep the entry `huggingface` in the recipe's `checkpoint`"
            )
        return {name: value for file in files for name, value in load_file(file).items()}
