"""What layers are computed from again in the backward pass, kept in the memory of the host until then.

Each layer of a model keeps its input alone where activations are computed again. Copies to the host run beside the
computation, into pinned memory that later micro-batches use again; in the backward pass the input of the layer that
comes next is on its way while one is computed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.autograd.graph import saved_tensors_hooks

from ptrain import ModelError
from ptrain_sequence_parallel.mlp import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARE = 0.1
"""Of a GPU's memory: where inputs of layers take less, what is gained is not worth the copies."""

BLOCK = 2**28
"""Bytes of the host's memory that are asked for at a time: of pinned memory torch takes the next power of two."""


@contextmanager
def offloading(
    model: PreTrainedModel, batch: Mapping[str, Any], how: Literal["auto"] | bool, memory: int | None = None
) -> Iterator[None]:
    """Within it, the inputs of layers (but of the last) that are kept for a backward pass go to the host until then.

    Args:
        batch: what the model's body is about to be given.
        how: `auto` does it on a GPU alone, for batches whose inputs of layers take more than `SHARE` of its memory.
        memory: of the GPU, in bytes; None where there is none.
    """
    ids, found = batch["input_ids"], layers(model)
    wanted = pays(model, ids, memory) if how == "auto" else how
    if not (wanted and found and torch.is_grad_enabled() and computes_again(model)):
        yield
        return
    kept = _Kept((*ids.shape, model.config.get_text_config().hidden_size))
    hook = found[-1].register_forward_pre_hook(kept.end)
    try:
        with saved_tensors_hooks(kept.pack, _Away.back):
            yield
    finally:
        hook.remove()


def check(model: PreTrainedModel) -> None:
    """Raise ModelError where `model` keeps its activations, of which there is nothing to offload."""
    if not computes_again(model):
        raise ModelError(
            "`offload_activations: true` offloads what layers are computed from again, and the layers of "
            f"{type(model).__name__} keep their activations",
            fix="write `model.disable_activation_checkpoint: false`, or leave `offload_activations` out",
        )


def computes_again(model: PreTrainedModel) -> bool:
    """Whether layers keep no more than their input, and are computed again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def pays(model: PreTrainedModel, ids: torch.Tensor, memory: int | None) -> bool:
    """Whether the inputs of all layers for `ids`, int64 [b, s], take more than `SHARE` of a GPU's `memory`."""
    return memory is not None and kept_bytes(model, ids.numel()) > SHARE * memory


def kept_bytes(model: PreTrainedModel, tokens: int) -> int:
    """What the inputs of all layers take, in bytes."""
    return len(layers(model)) * tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which copies run beside the computation; None where there is none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Within it, what is copied is copied beside the computation, after what was begun so far."""
    stream = _stream(device)
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


class _Kept:
    """What one forward pass keeps, in the order of its layers."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape, self._ended = shape, False
        self._before: weakref.ref[_Away] | None = None

    def pack(self, tensor: torch.Tensor) -> Any:
        """Hidden states on their way to the host; anything else as it is."""
        if self._ended or tensor.shape != self._shape or not tensor.is_floating_point():
            return tensor
        away = _Away(tensor.contiguous(), self._before)
        self._before = weakref.ref(away)
        return away

    def end(self, *args: Any) -> None:
        """The last layer begins, which is the first to need its input again: it stays, and so does what follows."""
        self._ended = True


class _Away:
    """Hidden states on the host."""

    def __init__(self, tensor: torch.Tensor, before: weakref.ref[_Away] | None) -> None:
        self._shape, self._dtype, self._before = tensor.shape, tensor.dtype, before
        self._device, self._coming = tensor.device, None
        stream = _stream(tensor.device)
        parts = tensor.view(-1).split(BLOCK // tensor.element_size())
        # torch keeps pinned memory that is no longer needed, and gives it out again once copies from it are over.
        self._blocks = [torch.empty_like(part, device="cpu", pin_memory=stream is not None) for part in parts]
        with _beside(tensor.device):
            for block, part in zip(self._blocks, parts, strict=True):
                block.copy_(part, non_blocking=True)
        if stream is not None:
            tensor.record_stream(stream)

    @staticmethod
    def back(kept: _Away | torch.Tensor) -> torch.Tensor:
        """What was kept, on its device; the input of the layer before is sent for."""
        if isinstance(kept, torch.Tensor):
            return kept
        tensor, kept._coming = kept.sent_for(), None
        stream = _stream(kept._device)
        if stream is not None:
            current = torch.cuda.current_stream(kept._device)
            current.wait_stream(stream)
            tensor.record_stream(current)
        before = kept._before() if kept._before is not None else None
        if before is not None:
            before.sent_for()
        return tensor

    def sent_for(self) -> torch.Tensor:
        """The hidden states, on their way to their device or there already."""
        if self._coming is None:
            with _beside(self._device):
                self._coming = torch.empty(self._shape, dtype=self._dtype, device=self._device)
                for part, block in zip(self._coming.view(-1).split(self._blocks[0].numel()), self._blocks, strict=True):
                    part.copy_(block, non_blocking=True)
        return self._coming
