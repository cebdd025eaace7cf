"""The state of training by parameter name, whatever ZeRO stage and number of workers: out of the engine and back.

DeepSpeed's own checkpoints are never used: they are pickles, and belong to one number of workers.

DeepSpeed keeps the fp32 weights and the optimizer's state in *masters*: at stage 0 one for each parameter (the
parameter itself in fp32), above that flat ones, of which each worker has its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ptrain.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from ptrain.engine import Engine

WEIGHT = "weight"
"""The key of the weight (fp32; of a buffer its own dtype) among the tensors of a name; others are the optimizer's."""
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in a loss scaler; only fp16 has one."""


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of each trainable parameter by name; tied ones once."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in trainable(model)}


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, with their names; tied ones once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that belong to the model's state, with their names."""
    kept = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def gather(engine: Engine, model: nn.Module, rank: int) -> Iterator[tuple[str, str, torch.Tensor | None]]:
    """`(name, key, tensor)` of everything that training changes; tensors on the CPU of rank 0, None elsewhere.

    `key` is `WEIGHT`, or what the optimizer calls a piece of its state; numbers such as its `step` come as
    tensors without dimensions. One tensor is whole at a time, and every worker must go through all of them,
    since ZeRO gathers each from all workers.

    Raises:
        CheckpointError: DeepSpeed keeps the state where it can't be read.
    """
    masters = _Masters(engine)
    for name, parameter in trainable(model):
        for key in masters.keys(parameter):
            tensor = masters.read(parameter, key)
            yield name, key, tensor.detach().to("cpu", copy=True) if rank == 0 else None
    for name, buffer in buffers(model):
        yield name, WEIGHT, buffer.detach().to("cpu", copy=True) if rank == 0 else None


def restore(
    engine: Engine, model: nn.Module, keys: Mapping[str, set[str]], read: Callable[[str, str], torch.Tensor]
) -> None:
    """Put back what `gather` gave, on every worker; the engine need not have made a step yet.

    Args:
        keys: the keys that were saved, by name.
        read: the tensor of a name and a key, on the CPU.

    Raises:
        CheckpointError: it was saved with another optimizer; nothing was changed.
    """
    masters = _Masters(engine)
    for name, parameter in trainable(model):
        wanted = set(masters.keys(parameter))
        if keys.get(name) != wanted:
            raise CheckpointError(
                f"the checkpoint holds {sorted(keys.get(name, ()))} of `{name}`, "
                f"and this optimizer has {sorted(wanted)}",
                fix="resume with the optimizer of that run",
            )
    for name, parameter in trainable(model):
        for key in masters.keys(parameter):
            masters.write(parameter, key, read(name, key))
    for name, buffer in buffers(model):
        buffer.copy_(read(name, WEIGHT))


def frozen_sums(engine: Engine, model: nn.Module) -> dict[str, int]:
    """A checksum of each frozen parameter by name; every worker must ask.

    Frozen weights are not saved, since the recipe makes them again; the sums tell whether it made the same. Bits
    are added as integers, so that the sum depends neither on an order nor on the number of workers.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        total = _own_part(engine, parameter).contiguous().view(torch.uint8).sum(dtype=torch.int64)
        if engine.stage == 3:
            shard: Any = parameter
            torch.distributed.all_reduce(total, group=shard.ds_process_group)
        found[name] = int(total)
    return found


def _own_part(engine: Engine, parameter: Any) -> torch.Tensor:
    """The whole parameter, or under ZeRO-3 this worker's share of it without the padding."""
    if engine.stage < 3:
        return parameter.detach()
    share = parameter.ds_tensor.numel()
    begin = share * torch.distributed.get_rank(parameter.ds_process_group)
    return parameter.ds_tensor.detach()[: max(0, min(share, parameter.ds_numel - begin))]


def loss_scale(engine: Engine) -> dict[str, float]:
    """Where the loss scaling of fp16 is."""
    scaler = _scaler(engine)
    return {name: value for name in LOSS_SCALE if (value := getattr(scaler, name, None)) is not None}


def set_loss_scale(engine: Engine, values: Mapping[str, float]) -> None:
    """Put back what `loss_scale` gave."""
    scaler = _scaler(engine)
    for name, value in values.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _scaler(engine: Engine) -> Any:
    wrapper = engine.deepspeed.optimizer
    return getattr(wrapper, "loss_scale_config", None) or getattr(wrapper, "loss_scaler", None)


class _Masters:
    """The masters of an engine, each with an optimizer state, addressed by the model's parameters."""

    def __init__(self, engine: Engine) -> None:
        wrapper: Any = engine.deepspeed.optimizer
        if getattr(wrapper, "swap_optimizer", False) or hasattr(wrapper, "fp32_groups_flat"):
            raise CheckpointError(
                "the optimizer's state can't be read: DeepSpeed keeps it on NVMe, or packs it in an order of its own",
                fix="offload to `cpu` instead of `nvme`; with FusedAdam in bf16 or fp16 use ZeRO stage 1 or above",
            )
        self._stage = engine.stage
        self._wrapper: Any = wrapper
        inner: Any = engine.deepspeed.basic_optimizer
        self._inner: torch.optim.Optimizer = inner
        for group, master in self._groups():
            if not self._inner.state[master]:
                _make_state(self._inner, group, master)
        self._by_parameter = self._one_by_one() if self._stage == 0 else {}
        self._flat = {} if self._stage == 0 else self._inner.state[self._groups()[0][1]]
        self._link()

    def _groups(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Each master with its parameter group."""
        groups = self._inner.param_groups
        if self._stage == 3:
            flats, owner = self._wrapper.fp32_partitioned_groups_flat, self._wrapper.sub_group_to_group_id
            return [(groups[owner[at]], flat) for at, flat in enumerate(flats)]
        return [(group, master) for group in groups for master in group["params"]]

    def _one_by_one(self) -> dict[int, torch.Tensor]:
        """Stage 0: the master by the id of the model's parameter; in fp32 they are one."""
        highs = [master for _, master in self._groups()]
        low_groups = getattr(self._wrapper, "fp16_groups", None)
        lows = highs if low_groups is None else [low for group in low_groups for low in group]
        return {id(low): high for low, high in zip(lows, highs, strict=True)}

    def _link(self) -> None:
        """Let ZeRO 1 and 2 find the state of every parameter group.

        DeepSpeed 0.19.8 does so after the first group's first step, when the others have no state yet, and then
        never again. The names are private: where they are gone, so is the mistake.
        """
        if hasattr(self._wrapper, "_hp_optimizer_states_linked"):
            self._wrapper._hp_optimizer_states_linked = False
            self._wrapper._lazy_init_hp_params_optimizer_state()

    def _state(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """The state of the parameter's master; flat ones have taken the same steps, so one stands for all."""
        return self._inner.state[self._by_parameter[id(parameter)]] if self._stage == 0 else self._flat

    def keys(self, parameter: nn.Parameter) -> list[str]:
        """The keys of a parameter, in the same order on every worker."""
        return [WEIGHT, *sorted(key for key, value in self._state(parameter).items() if value is not None)]

    def read(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """A whole tensor of a parameter; every worker must ask."""
        if self._stage == 0:
            master = self._by_parameter[id(parameter)]
            return master if key == WEIGHT else torch.as_tensor(self._inner.state[master][key])
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key != WEIGHT and _is_number(self._flat[key]):
            return torch.as_tensor(self._flat[key])
        whole: Any = (
            safe_get_full_fp32_param(parameter) if key == WEIGHT else safe_get_full_optimizer_state(parameter, key)
        )
        return whole

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set a whole tensor of a parameter; every worker must."""
        if key == WEIGHT:
            self._write_weight(parameter, value)
        elif self._stage == 0:
            _set(self._inner.state[self._by_parameter[id(parameter)]], key, value)
        elif _is_number(self._flat[key]):
            for _, master in self._groups():
                _set(self._inner.state[master], key, value)
        else:
            self._write_flat(parameter, value, key)

    def _write_weight(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Both the fp32 weight and the one the model computes with, which ZeRO renews only at its next step."""
        if self._stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)
        if self._stage == 0:
            self._by_parameter[id(parameter)].copy_(value)
        else:
            self._write_flat(parameter, value, None)

    def _write_flat(self, parameter: Any, value: torch.Tensor, key: str | None) -> None:
        """This worker's share of a tensor; without a key, of the weight."""
        import deepspeed.utils as parts

        if self._stage == 3:
            # DeepSpeed's function for whole tensors fails where the last worker's share is padded.
            share = parameter.ds_tensor.numel()
            begin = share * torch.distributed.get_rank(parameter.ds_process_group)
            own = value.flatten()[begin : begin + share]
            own = torch.nn.functional.pad(own, (0, share - own.numel()))
            if key is None:
                parts.safe_set_local_fp32_param(parameter, own)
            else:
                parts.safe_set_local_optimizer_state(parameter, own, key)
        elif key is None:
            parts.safe_set_full_fp32_param(parameter, value)
        else:
            parts.safe_set_full_optimizer_state(parameter, value, key)


def _is_number(value: Any) -> bool:
    return not torch.is_tensor(value) or value.ndim == 0


def _set(state: dict[str, Any], key: str, value: torch.Tensor) -> None:
    """Set an entry of an optimizer's state, keeping its type and device."""
    if torch.is_tensor(state[key]):
        state[key].copy_(value)
    else:
        state[key] = type(state[key])(value.item())


@torch.no_grad()
def _make_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], master: torch.Tensor) -> None:
    """Let the optimizer make its state for one master: a step with rate 0 and gradient 0, which is then uncounted.

    No optimizer offers it otherwise. What comes out is the state of a parameter that has not been updated yet.
    """
    groups, gradient = optimizer.param_groups, master.grad
    optimizer.param_groups = [{**group, "params": [master], "lr": 0.0}]
    master.grad = torch.zeros_like(master)
    try:
        optimizer.step()
    finally:
        optimizer.param_groups, master.grad = groups, gradient
    state = optimizer.state[master]
    if "step" in state:
        _set(state, "step", torch.zeros(()))
