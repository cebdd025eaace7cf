"""What the configurations of all families have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict


@strict
@dataclass(kw_only=True, repr=False, eq=False)
class SwiftKVConfig:
    """Base of the configurations: the family's own fields, and these.

    Attributes:
        swiftkv: whether later layers share keys and values; false is the model that it was made from.
        num_key_value_layers: how many layers, the first ones, are ordinary; None for all.
        key_value_group_size: how many of the later layers share keys and values.
    """

    swiftkv: bool = True
    num_key_value_layers: int | None = None
    key_value_group_size: int = 1

    if TYPE_CHECKING:
        num_hidden_layers: int

    def groups(self) -> Iterator[range]:
        """The layers that share keys and values, first to last; those of a group are contiguous."""
        size, count = self.key_value_group_size, self.num_hidden_layers
        for first in range(self.kept, count, size):
            yield range(first, min(first + size, count))

    @property
    def kept(self) -> int:
        """How many layers are ordinary."""
        return self.num_hidden_layers if self.num_key_value_layers is None else self.num_key_value_layers
