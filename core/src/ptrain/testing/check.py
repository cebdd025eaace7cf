"""`Check`: one promise."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptrain.errors import PtrainError

if TYPE_CHECKING:
    from ptrain.testing.study import Study


OK, FAILED, LEFT_OUT = "ok", "failed", "not applicable"


class NotApplicable(Exception):
    """Raised by a check that has nothing to look at: the message says why."""


@dataclass(frozen=True)
class Check:
    """One promise of a plugin.

    Attributes:
        name: what it is called.
        look: takes a study; raises PluginError where the promise is broken, `NotApplicable` where there is nothing to
            look at.
        kinds: of plugins that make it; empty for all.
    """

    name: str
    look: Callable[[Study], None]
    kinds: tuple[str, ...] = ()

    def outcome(self, study: Study) -> Outcome:
        """Make the check, and say what came of it."""
        try:
            self.look(study)
        except NotApplicable as reason:
            return Outcome(self.name, LEFT_OUT, str(reason))
        except PtrainError as error:
            return Outcome(self.name, FAILED, str(error))
        except Exception as error:
            return Outcome(self.name, FAILED, f"{study.who}: {type(error).__name__}: {error}\n  in {_place(error)}")
        return Outcome(self.name, OK)


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Attributes:
        check: its name.
        state: `OK`, `FAILED` or `LEFT_OUT`.
        reason: what is wrong, with the plugin, its distribution, and what was expected; or why nothing was looked at.
    """

    check: str
    state: str
    reason: str = ""


def _place(error: Exception) -> str:
    """File, line and function in which an error was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno} ({last.name})"
