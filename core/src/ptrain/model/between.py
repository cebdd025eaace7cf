"""Hidden states between the layers of a model, taken as they pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ptrain.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Between:
    """Within it, a forward pass leaves behind what goes into the layers that are asked for.

    Only these are kept, where `output_hidden_states` would keep all of them.

    Args:
        layers: numbered as transformers numbers hidden states: 0 is the embeddings, i what goes into layer i, and -1
            what comes out of the final norm.

    Raises:
        ModelError: the model has no list of layers, or not so many.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self._found: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []
        modules: Any = getattr(model.base_model, "layers", None)
        if layers and not isinstance(modules, nn.ModuleList):
            raise ModelError(f"{type(model).__name__} keeps its layers where they are not found")
        self._modules = modules
        self._last = count = len(modules) if layers else 0
        self._wanted = [at + count + 1 if at < 0 else at for at in layers]
        for at, asked in zip(self._wanted, layers, strict=True):
            if not 0 <= at <= count:
                raise ModelError(f"there is no hidden state {asked}", expected=f"{-count - 1} to {count}")

    def __enter__(self) -> Between:
        for at in {at for at in self._wanted if at < self._last}:
            hook = self._modules[at].register_forward_pre_hook(self._keeper(at), with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Before a backward pass that recomputes layers, which would go through them again.
        for hook in self._hooks:
            hook.remove()

    def stacked(self, last: torch.Tensor) -> torch.Tensor:
        """The hidden states that were asked for, [b, s, n, h]; `last` is what the body returned."""
        return torch.stack([last if at == self._last else self._found[at] for at in self._wanted], dim=2)

    def _keeper(self, at: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._found[at] = args[0] if args else kwargs["hidden_states"]

        return keep
