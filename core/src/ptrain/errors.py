"""The errors that users see: what was found, where, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BAD_INPUT = 2
"""Exit code of everything that the user can mend: recipe, data, model, disk."""


@dataclass(frozen=True, order=True)
class Position:
    """A place in a file (or in an override), counted from 1; line 0 means the whole file."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return self.file if not self.line else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: what was found, as one sentence without a full stop.
        where: the place, when there is one.
        expected: what would have been right.
        fix: the likely remedy, as an imperative ("write `lr`").
    """

    message: str
    where: Position | None = None
    expected: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        rest = [f"  expected: {self.expected}"] if self.expected else []
        rest += [f"  fix: {self.fix}"] if self.fix else []
        return "\n".join([head, *rest])


class PtrainError(Exception):
    """Base of every error that is shown without a traceback."""

    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        where: Position | None = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problems: list[Problem] = [Problem(message, where, expected, fix)]
        super().__init__(message)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class RecipeError(PtrainError):
    """The recipe is wrong: every problem of every section, sorted by line."""

    exit_code = BAD_INPUT

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> RecipeError:
        """The one error that carries all `problems`."""
        listed = sorted(problems, key=lambda p: p.where or Position(""))
        error = cls(listed[0].message)
        error.problems = listed
        return error


class DataError(PtrainError):
    """A data source, a row or a chat template is wrong."""

    exit_code = BAD_INPUT


class ModelError(PtrainError):
    """A model or tokenizer can't be loaded or does not fit the recipe."""

    exit_code = BAD_INPUT


class MissingData(DataError):
    """Data is not here: it may be elsewhere, such as on the hub."""


class MissingModel(ModelError):
    """A model or tokenizer is not here: it may be elsewhere, such as on the hub."""


class PluginError(PtrainError):
    """A plugin can't be loaded, breaks a promise of its hook, or failed in one."""

    exit_code = BAD_INPUT


class CheckpointError(PtrainError):
    """A checkpoint is damaged, is for another recipe, or can't be written."""

    exit_code = BAD_INPUT


class TrainingError(PtrainError):
    """Training itself went wrong (a loss that is not finite, say): exit code 1."""
