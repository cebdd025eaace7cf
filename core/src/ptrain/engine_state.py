"""The state of training by parameter name, whatever ZeRO stage and number of workers: out of the engine and back.

DeepSpeed's own checkpoints are never used: they are pickles, and belong to one number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from ptrain.engine import Engine

Tensors = dict[str, torch.Tensor]
WEIGHT = "weight"
"""The name of the fp32 weight among the tensors of a parameter; the others are the optimizer's."""


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of each trainable parameter by name; tied ones once."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in trainable(model)}


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, with their names."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def gather(engine: Engine, model: nn.Module, rank: int) -> Iterator[tuple[str, Tensors]]:
    """`(name, tensors)` of each trainable parameter; the tensors are on the CPU of rank 0 alone.

    Every worker must go through all of them, since ZeRO gathers each from all workers.
    """
    _link(engine)
    for name, parameter in trainable(model):
        tensors = _read(engine, parameter)
        yield name, {key: value.detach().cpu() for key, value in tensors.items()} if rank == 0 else {}


def restore(engine: Engine, model: nn.Module, read: Callable[[str], Tensors], step: int) -> None:
    """Put back what `gather` gave: `read(name)` on every worker, and `step`, the optimizer steps done."""
    _prime(engine, model)
    _link(engine)
    for name, parameter in trainable(model):
        _write(engine, parameter, read(name))
    for state in _inner(engine).state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step


def _inner(engine: Engine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's."""
    optimizer = engine.deepspeed.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "optimizer") else (
        getattr(optimizer, "optimizer", optimizer)
    )


def _moments(state: Mapping[str, Any]) -> list[str]:
    return [key for key, value in state.items() if torch.is_tensor(value) and key != "step"]


def _prime(engine: Engine, model: nn.Module) -> None:
    """Take one step with rate 0 and gradient 0, so that every optimizer has made its state.

    A step with rate 0 changes no weight, and no API of DeepSpeed makes the state otherwise.
    """
    groups = engine.deepspeed.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    device = next(iter(model.parameters())).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    out = engine(lambda: {"zero": model(input_ids=ids, use_cache=False).logits.float().sum() * 0.0})
    engine.backward(out["zero"])
    engine.update()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _link(engine: Engine) -> None:
    """Let ZeRO 1 and 2 find the optimizer's state of every parameter group.

    DeepSpeed 0.19.8 does so after the first group's first step, when the others have no state yet, and then
    never again. The names are private: where they are gone, so is the mistake.
    """
    optimizer = engine.deepspeed.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _masters(engine: Engine) -> dict[int, torch.Tensor]:
    """Stage 0: the fp32 weight that the optimizer updates, by the id of the model's parameter."""
    optimizer = engine.deepspeed.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def _read(engine: Engine, parameter: nn.Parameter) -> Tensors:
    if engine.stage == 0:
        master = _masters(engine).get(id(parameter), parameter)
        state = _inner(engine).state[master]
        return {WEIGHT: master, **{key: state[key] for key in _moments(state)}}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    keys = _moments(next(iter(_inner(engine).state.values())))
    found = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
    return {WEIGHT: safe_get_full_fp32_param(parameter), **found}


@torch.no_grad()
def _write(engine: Engine, parameter: nn.Parameter, tensors: Tensors) -> None:
    if engine.stage == 0:
        master = _masters(engine).get(id(parameter), parameter)
        master.copy_(tensors[WEIGHT])
        if master is not parameter:
            parameter.copy_(tensors[WEIGHT])
        state = _inner(engine).state[master]
        for key in _moments(state):
            state[key].copy_(tensors[key])
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _write_model_weight(engine, parameter, tensors[WEIGHT])
    safe_set_full_fp32_param(parameter, tensors[WEIGHT])
    for key, value in tensors.items():
        if key != WEIGHT:
            safe_set_full_optimizer_state(parameter, value, key)


def _write_model_weight(engine: Engine, parameter: nn.Parameter, weight: torch.Tensor) -> None:
    """The weight that the model computes with: ZeRO makes it from the fp32 one only at its next step."""
    if engine.stage < 3:
        parameter.data.copy_(weight)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(weight)
