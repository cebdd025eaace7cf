"""`wandb`: metrics to Weights & Biases; switched on by `wandb.enable`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ptrain.errors import RecipeError
from ptrain.parts import Tracker
from ptrain.recipe.dump import dump
from ptrain.recipe.env import resolve
from ptrain.recipe.sections import TrackerConfig

if TYPE_CHECKING:
    from ptrain.run import Run


class WandB(Tracker):
    """One W&B run, which a resumed start goes on with."""

    class Config(TrackerConfig):
        """Keys of `wandb`."""

    def start(self, run: Run) -> None:
        """Start the W&B run, or go on with that of this run directory."""
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an extra
        except ImportError as error:
            raise RecipeError("wandb was asked for and is not installed", fix="pip install wandb") from error
        settings = resolve(run.recipe.wandb)
        kept = run.dir / "wandb-run-id"
        known = kept.read_text().strip() if kept.exists() and run.progress.step else None
        self._run = wandb.init(
            entity=settings.entity, project=settings.project, name=settings.name, id=known, dir=str(run.dir),
            resume="allow" if known else None, config=dump(run.recipe),
        )  # fmt: skip
        kept.write_text(self._run.id)

    def log(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of one step."""
        self._run.log(dict(metrics), step=metrics["step"])

    def finish(self, run: Run) -> None:
        """Finish the W&B run."""
        self._run.finish()
