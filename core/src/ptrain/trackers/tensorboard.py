"""`tensorboard`: metrics as TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.parts import Tracker
from ptrain.recipe.sections import TrackerConfig

if TYPE_CHECKING:
    from ptrain.run import Run


class TensorBoard(Tracker):
    """Writes every number; a resumed start hides the steps that it repeats."""

    class Config(TrackerConfig):
        """Keys of `tensorboard`."""

        log_dir: Path | None = None
        """The folder; by default `tensorboard` in the run directory."""

    def start(self, run: Run) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        folder = self.config.log_dir or run.dir / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=run.progress.step + 1)

    def log(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one step."""
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])

    def finish(self, run: Run) -> None:
        """Close the event file."""
        self._writer.close()
