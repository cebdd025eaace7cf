"""`Check`: one promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptrain.testing.study import Study


class NotApplicable(Exception):
    """Raised by a check that has nothing to look at: the message says why."""


@dataclass(frozen=True)
class Check:
    """One promise of a plugin.

    Attributes:
        name: what it is called.
        look: takes a study; raises PluginError where the promise is broken.
        kinds: of plugins that make it; empty for all.
    """

    name: str
    look: Callable[[Study], None]
    kinds: tuple[str, ...] = ()

    def __call__(self, study: Study) -> None:
        """Make the check.

        Raises:
            PluginError: the promise is broken; with the plugin's name and distribution, what was found and expected.
            NotApplicable: there is nothing to look at.
        """
        self.look(study)
