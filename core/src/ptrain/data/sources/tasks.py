"""`tasks`: generated questions and answers, for trying things out without any data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ptrain.data.sources.base import checked, stored
from ptrain.data.tasks import generate, task_names
from ptrain.errors import DataError
from ptrain.parts import Source
from ptrain.recipe.sections import Positive, SourceConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain.run import Run


class Tasks(Source):
    """A seeded family of small tasks; no question of the evaluation part is ever in the training part."""

    samples = True

    class Config(SourceConfig):
        """Keys of `tasks`."""

        tasks: list[str] = []
        """Which tasks, evenly mixed; by default all."""
        count: Positive = 10_000
        """How many rows."""
        seed: int = 0
        """Which rows."""

    def load(self, run: Run, split: str) -> Dataset:
        """The rows of the part "train" or "eval".

        Raises:
            DataError: an unknown task, another split, or more evaluation rows than there are questions.
        """
        if split not in ("train", "eval"):
            raise DataError(f"the source `tasks` has no split `{split}`", expected="train or eval")
        config = self.config
        try:
            made = generate(config.tasks or task_names(), config.count, config.seed, split)
            return stored(checked(enumerate(made, 1), f"tasks ({split})"), config)
        except ValueError as error:
            raise DataError(str(error)) from error

    def fingerprint(self) -> Any:
        """The first questions of each task: they change when the generator does."""
        names = self.config.tasks or task_names()
        try:
            return [row["messages"] for row in generate(names, 4 * len(names), self.config.seed, "train")]
        except ValueError as error:
            raise DataError(str(error)) from error
