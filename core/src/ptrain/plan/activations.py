"""What a forward and a backward pass keep, found by going through both on the device `meta`, where nothing is computed.

Every operation of the model runs and says how large its result would be; what is alive at a time is added up. So no
formula has to know the architecture, and a layer that a plugin replaced counts as what it is. Attention is the one
exception: kernels keep queries, keys, values, the result and one number a query, and never the scores.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from ptrain.model.attention import TRACED
from ptrain.model.head import layer_of, output_head
from ptrain.model.logprobs import picked
from ptrain.model.nll import summed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

META = torch.device("meta")
MAKERS = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten._to_copy}
"""Operations that can make a tensor without values elsewhere than on the device."""


@dataclass(frozen=True)
class Peak:
    """The most bytes that are alive at a time: on the `device`, and on the `host` of what is moved there.

    `kept` are those on the device between the forward and the backward pass.
    """

    device: int
    host: int
    kept: int


def body(
    model: PreTrainedModel, forward: Callable[[], torch.Tensor], *, recompute: bool, gradients: bool = False
) -> Peak:
    """The most bytes that are alive at a time in the passes of a micro-batch through the body of a model on `meta`.

    Args:
        forward: the forward pass, to the last hidden states.
        recompute: with activation checkpointing.
        gradients: count those of the parameters too, which grow while activations shrink.

    Raises:
        Exception: whatever a model raises whose computation depends on values.
    """
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has another name in newer versions of transformers
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
    with _counted(model, gradients) as live:
        hidden = forward()
        kept = live.now
        if hidden.requires_grad:
            hidden.backward(torch.empty_like(hidden))
    return Peak(live.peak, live.host_peak, kept)


def logits(model: PreTrainedModel, labels: int, rows: int) -> int:
    """The most bytes that are alive at a time while log-probabilities of `labels` labels are computed and learnt.

    That is so for those of each label, and for their sum, of which the larger is given.

    Args:
        rows: positions of a tile, as `ptrain.model.logprobs.token_logprobs` has it.
    """
    if not labels:
        return 0
    head, width = output_head(model), model.config.get_text_config().hidden_size
    targets = torch.zeros(labels, dtype=torch.int64, device="meta")

    def peak(work: Callable[[torch.Tensor], torch.Tensor]) -> int:
        with _counted(model) as live:
            states = torch.empty(labels, width, dtype=model.dtype, device="meta", requires_grad=True)
            work(states).backward()
        return live.peak

    at = torch.zeros(labels, dtype=torch.int64, device="meta")
    return max(
        peak(lambda states: picked(head, states, targets, rows).sum()),
        peak(lambda states: summed(head, layer_of(head), states, at, targets, rows)),
    )


@contextmanager
def _counted(model: PreTrainedModel, gradients: bool = False) -> Iterator[_Live]:
    """Within it, what is made is counted, but for parameters and buffers; gradients of parameters until they are whole,
    or all the time."""
    mode = _Live([*model.parameters(), *model.buffers()])
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [] if gradients else [p.register_post_accumulate_grad_hook(_forget) for p in trained]
    try:
        with mode:
            yield mode
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Adds up the storages that are alive: `now`, and the most so far, `peak`.

    What is asked for in the memory of the machine (`cpu`), to move activations there, is on `meta` too and counted on
    its own: `host`, `host_peak`.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.host = self.host_peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moved = func.overloadpacket in MAKERS and _on_cpu(args, kwargs)
        result = func(*args, **kwargs) if not moved else func(*args, **{**kwargs, "device": META, "pin_memory": None})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), moved)
        return result

    def _add(self, storage: Any, host: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._count(size, host)
        weakref.finalize(storage, self._free, key, size, host)

    def _count(self, size: int, host: bool) -> None:
        if host:
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
        else:
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int, host: bool) -> None:
        self._seen.discard(key)
        self._count(-size, host)


def _on_cpu(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether memory of the machine is asked for, to hold what has no values: an empty tensor, or a copy."""
    given = next((one for one in args if isinstance(one, torch.Tensor)), None)
    wanted = kwargs.get("device", given.device if given is not None else torch.get_default_device())
    return wanted.type == "cpu" and (given is None or given.is_meta)


class _Kept(torch.autograd.Function):
    """What attention keeps: its inputs, its result, and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[b, heads, s, d] queries to [b, s, heads, d]."""
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[3])
        ctx.save_for_backward(query, key, value, out, query.new_empty(rows, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gradients of the inputs."""
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[Any, None]:
    return _Kept.apply(query, key, value), None


AttentionInterface.register(TRACED, _attention)
AttentionMaskInterface.register(TRACED, lambda *args, **kwargs: None)
