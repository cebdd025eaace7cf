"""MLPs a tile of tokens at a time: what they compute between their linear layers is never there for a whole sequence.

An MLP is found by its structure. Nothing is kept of a tile but its input; the backward pass computes it again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.pytorch_utils import Conv1D

from ptrain import ModelError
from ptrain.weights import gather_together, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE, PROBE_TILE = 8, 3
"""Tokens, and tokens of a tile, with which an MLP is tried."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far tiles may be from the whole, as a share of the largest number."""
PLANNED = 3
"""Tiles that a plan follows: from the third one on, gradients are added up in place."""
Forward = Callable[[torch.Tensor], torch.Tensor]


def tile(model: PreTrainedModel, tokens: int | Literal["auto"], strict: bool, say: Callable[[str], None]) -> None:
    """Have the MLPs of `model` compute so many tokens at a time; to be called before there is an engine.

    Under ZeRO-3 each still gathers its weights once a call, so that workers may have unequally many tiles; there,
    every worker has to call this.

    Args:
        tokens: of a tile; `auto`: as many as a hidden state has numbers.
        strict: refuse a model with an MLP that can't be cut, instead of leaving that as it is.
        say: tells the user what was done.

    Raises:
        ModelError: an MLP can't be cut, and `strict`; or one that looks as if it could gives something else in tiles.
    """
    if strict:
        check(model)
    size = model.config.get_text_config().hidden_size if tokens == "auto" else tokens
    found = [mlp for layer in layers(model) for mlp in mlps(layer)]
    for mlp in {_kind(mlp): mlp for mlp in found}.values():
        _try(mlp, model)
    for mlp in found:
        gather_together(mlp)
        mlp.forward = MethodType(_in_tiles(size), mlp)
    if found:
        say(f"MLPs are computed {size:,} tokens at a time ({len(found)} of them)")
    if fault := _fault(model):
        say(f"some MLPs are computed for all tokens at once: {fault}")


def check(model: PreTrainedModel) -> None:
    """Raise ModelError where a layer of `model`, which may be on the device `meta`, has no MLP that can be cut."""
    if fault := _fault(model):
        raise ModelError(
            f"{type(model).__name__} can't compute its MLPs in tiles: {fault}",
            expected="a module that maps hidden states to hidden states by linear layers and activations alone",
            fix="write `tiled_mlp: auto`, which leaves such an MLP as it is",
        )


def _fault(model: PreTrainedModel) -> str | None:
    """Why the first MLP that can't be cut can't be; None where there is none."""
    found = layers(model)
    if not found:
        return "its layers are in no list where they could be found"
    for number, layer in enumerate(found):
        if not mlps(layer):
            return f"layer {number} ({type(layer).__name__}) has {_instead(layer)}"
    return None


def _instead(layer: nn.Module) -> str:
    """What a layer has in the place of an MLP that can be cut."""
    for name, child in layer.named_children():
        if _takes_hidden_states(child) and any(p.ndim > 1 or hasattr(p, "ds_tensor") for p in child.parameters()):
            strange = next((type(m).__name__ for m in child.modules() if not _understood(m, child)), None)
            if strange is not None:
                inside = f", which holds {strange}" if strange != type(child).__name__ else ""
                return f"`{name}` ({type(child).__name__}){inside}"
    return "no module of its own for its MLP"


def layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The layers of a model: its longest list of modules, by the number of their weights."""
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=_size)) if lists else []


def _size(module: nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def mlps(layer: nn.Module) -> list[nn.Module]:
    """The children of a layer that map each hidden state to one, by linear layers and activations alone.

    Attention, too, may be made of linear layers alone, but it takes more than hidden states.
    """
    return [
        child
        for child in layer.children()
        if _takes_hidden_states(child)
        and all(_understood(m, child) for m in child.modules())
        and sum(isinstance(m, LINEAR) for m in child.modules()) > 1
    ]


LINEAR = (nn.Linear, Conv1D)
"""`Conv1D` is what GPT-2 calls its linear layers."""


def _takes_hidden_states(module: nn.Module) -> bool:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len([p for p in parameters if p.kind not in kinds]) == 1


def _understood(part: nn.Module, mlp: nn.Module) -> bool:
    """Whether a part of an MLP is a linear layer, or holds no numbers of its own: an activation, dropout, a container.

    A list of modules is one of experts, of which each gets other tokens.
    """
    own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    return isinstance(part, LINEAR) or not (own or isinstance(part, nn.ModuleList))


def _kind(mlp: nn.Module) -> tuple[Any, ...]:
    """What MLPs have in common of which one is tried."""
    return (type(mlp), *(type(m) for m in mlp.modules()))


@torch.no_grad()
def _try(mlp: nn.Module, model: PreTrainedModel) -> None:
    """Raise ModelError where tiles of a few random hidden states give something else than the whole."""
    weights = {name: whole(p) for name, p in mlp.named_parameters()}
    like = next((w for w in weights.values() if w.is_floating_point()), None)
    if like is None or like.is_meta:
        return
    drawn = torch.Generator().manual_seed(0)
    states = torch.randn(1, PROBE, model.config.get_text_config().hidden_size, generator=drawn).to(like)
    sharded = any(hasattr(p, "ds_tensor") for p in mlp.parameters())

    def compute(x: torch.Tensor) -> Any:
        return torch.func.functional_call(mlp, weights, (x,)) if sharded else mlp(x)

    mode = mlp.training
    mlp.eval()
    try:
        expected = compute(states)
        parts = [compute(part) for part in states.split(PROBE_TILE, dim=1)]
    finally:
        mlp.train(mode)
    if not isinstance(expected, torch.Tensor) or expected.shape != states.shape or not _close(parts, expected):
        raise ModelError(
            f"{type(mlp).__name__} of {type(model).__name__} looks like an MLP, and gives something else for a part of "
            "a sequence than for the whole",
            fix="write `tiled_mlp: false`",
        )


def _close(parts: Sequence[torch.Tensor], expected: torch.Tensor) -> bool:
    difference, largest = (torch.cat(list(parts), 1) - expected).abs().max(), expected.abs().max()
    return bool(difference <= TOLERANCE.get(expected.dtype, 0.05) * largest)


def _in_tiles(size: int) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """The forward pass of an MLP for `size` tokens at a time."""

    def forward(mlp: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        plain: Forward = partial(type(mlp).forward, mlp)
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        trained = [p for p in mlp.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and (rows.requires_grad or trained):
            # A single tile too: ZeRO adds gradients up over the workers in the order in which they come, and here they
            # come in another order than from the plain layers.
            # What is kept is named before the tiles are computed: a layer that is computed again to have it stops here.
            made = _Tiled.apply(_Again(plain, rows), size, rows, *trained)
        else:
            made = _empty(rows)
        _fill(made.detach(), rows.detach(), plain, size)
        return made.view_as(hidden)

    return forward


def _empty(rows: torch.Tensor) -> torch.Tensor:
    """A place for what an MLP makes of `rows`, whose last layer is a linear one."""
    return torch.empty_like(rows, dtype=_autocast(rows.device.type) or rows.dtype)


def _autocast(device: str) -> torch.dtype | None:
    """The dtype of autocast where it is on; a plan computes on `meta`, of which it knows nothing."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


@torch.no_grad()
def _fill(out: torch.Tensor, rows: torch.Tensor, plain: Forward, size: int) -> None:
    """Write to `out` [1, n, h] what `plain` makes of each tile of `rows` [1, n, h]."""
    for place, part in _tiles(size, out, rows):
        place.copy_(plain(part))


def _tiles(size: int, *tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The tiles of tensors [1, n, ...]. In a plan, which has no values, the first ones: all take the same memory."""
    length = tensors[0].shape[1]
    for number, begin in enumerate(range(0, length, size)):
        if tensors[0].is_meta and number == PLANNED:
            return
        yield [tensor.narrow(1, begin, min(size, length - begin)) for tensor in tensors]


class _Again:
    """Computes `plain` as it is computed now: with the same dropout and, under autocast, the same dtypes."""

    def __init__(self, plain: Forward, like: torch.Tensor) -> None:
        self._plain, self._device, self._dtype = plain, like.device.type, _autocast(like.device.type)
        self._host, (self._devices, self._states) = torch.get_rng_state(), get_device_states(like)

    @contextmanager
    def __call__(self) -> Iterator[Forward]:
        kind = "cpu" if self._device == "meta" else self._device
        autocast = torch.autocast(kind, dtype=self._dtype, enabled=self._dtype is not None)
        with torch.random.fork_rng(self._devices), autocast:
            torch.set_rng_state(self._host)
            set_device_states(self._devices, self._states)
            yield self._plain


class _Tiled(torch.autograd.Function):
    """A place for what an MLP makes of rows [1, n, h], to be filled; its backward pass goes through the tiles."""

    @staticmethod
    def forward(ctx: Any, again: _Again, size: int, rows: torch.Tensor, *weights: nn.Parameter) -> torch.Tensor:
        """The place."""
        ctx.again, ctx.size, ctx.weights = again, size, weights
        ctx.save_for_backward(rows)
        return _empty(rows)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares any number of gradients
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of rows and weights; those of the weights are added up in fp32 at least."""
        (rows,) = ctx.saved_tensors
        made, sums = torch.empty_like(rows), _Sums()
        with ctx.again() as plain:
            for place, part, arrived in _tiles(ctx.size, made, rows, grad):
                own, *found = _gradients(plain, part, arrived, ctx.weights)
                place.copy_(own)
                sums.add(found)
        gradients = [total.to(weight.dtype) for total, weight in zip(sums.values, ctx.weights, strict=True)]
        return None, None, made if ctx.needs_input_grad[2] else None, *gradients


def _gradients(
    plain: Forward, part: torch.Tensor, arrived: torch.Tensor, weights: Sequence[nn.Parameter]
) -> Sequence[torch.Tensor]:
    leaf = part.detach().requires_grad_()
    with torch.enable_grad():
        out = plain(leaf)
    return torch.autograd.grad(out, [leaf, *weights], arrived, allow_unused=True, materialize_grads=True)


class _Sums:
    """Gradients added up over tiles, in fp32 at least where there are several."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self._own = False

    def add(self, found: Sequence[torch.Tensor]) -> None:
        """Add those of a tile."""
        pairs = zip(self.values, found, strict=bool(self.values))
        if self._own:
            self.values = [total.add_(one) for total, one in pairs]
        elif self.values:
            # Autograd may give one tensor as several gradients: what is added to from here on is a new one.
            self.values = [total.to(torch.promote_types(total.dtype, torch.float32)) + one for total, one in pairs]
            self._own = True
        else:
            self.values = list(found)
