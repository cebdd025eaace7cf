"""The state of training by parameter name, whatever ZeRO stage and number of workers: out of the engine and back.

DeepSpeed's own checkpoints are never used: they are pickles, and belong to one number of workers.

DeepSpeed keeps the fp32 weights and the optimizer's state in *masters*: at stage 0 one for each parameter (the
parameter itself in fp32), above that flat ones, of which each worker has its share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ptrain.errors import CheckpointError
from ptrain.weights import unreadable, whole

if TYPE_CHECKING:
    from torch import nn

    from ptrain.engine import Engine

WEIGHT = "weight"
"""The key of the weight itself (fp32; of a buffer its own dtype); the other keys are the optimizer's."""
GROUPS = ("fp16_groups", "bit16_groups", "bf16_groups")
"""Where DeepSpeed's optimizers have the model's parameters; in fp32 at stage 0 torch's is the only one."""
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

    `key` is `WEIGHT`, or what the optimizer calls a piece of its state, where it has one yet; numbers such as its
    `step` come as tensors without dimensions. One tensor is whole at a time, and every worker must go through all
    of them, since ZeRO gathers each from all workers.

    Raises:
        CheckpointError: DeepSpeed keeps the state where it can't be read.
    """
    masters = _masters(engine)
    for name, parameter in trainable(model):
        masters.check(name, parameter)
        for key in masters.keys(parameter):
            tensor = masters.read(parameter, key)
            yield name, key, tensor.detach().to("cpu", copy=True) if rank == 0 else None
    for name, buffer in buffers(model):
        yield name, WEIGHT, buffer.detach().to("cpu", copy=True) if rank == 0 else None


def restore(
    engine: Engine, model: nn.Module, keys: Mapping[str, Collection[str]], read: Callable[[str, str], torch.Tensor]
) -> None:
    """Put back what `gather` gave, on every worker; the engine need not have made a step yet.

    Args:
        keys: the keys that were saved, by name.
        read: the tensor of a name and a key, on the CPU.

    Raises:
        CheckpointError: it was saved with another optimizer.
    """
    masters, parameters, sizes = _masters(engine), trainable(model), shapes(model)
    masters.make([parameter for name, parameter in parameters if len(keys.get(name, ())) > 1])
    for name, parameter in parameters:
        masters.check(name, parameter)
        saved, wanted = sorted(keys.get(name, ())), sorted(masters.keys(parameter))
        if saved not in (wanted, [WEIGHT]):
            raise CheckpointError(
                f"the checkpoint holds {saved} of `{name}`, and this optimizer has {wanted}",
                fix="resume with the optimizer of that run",
            )
    with torch.no_grad(), masters.writing():
        # A flat master has one `step`: that of the parameter which has made the most of them, and is written last.
        for name, parameter in sorted(parameters, key=lambda pair: _steps(pair[0], keys, read)):
            for key in masters.keys(parameter):
                # What was not there yet when it was saved is zero.
                masters.write(parameter, key, read(name, key) if key in keys[name] else torch.zeros(sizes[name]))
    for name, buffer in buffers(model):
        buffer.copy_(read(name, WEIGHT))


def _steps(name: str, keys: Mapping[str, Collection[str]], read: Callable[[str, str], torch.Tensor]) -> float:
    """How many updates a parameter has had: at stage 0, one without gradients has fewer than others."""
    return float(read(name, "step")) if "step" in keys[name] else 0.0


def frozen_sums(model: nn.Module) -> dict[str, int]:
    """A checksum of each frozen parameter by name; every worker must ask.

    Frozen weights are not saved, since the recipe makes them again; the sums tell whether it made the same. Bytes
    are added as integers, so that the sum does not depend on an order.
    """
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    return {name: int(whole(p).contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64)) for name, p in frozen}


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


def _masters(engine: Engine) -> _Masters:
    wrapper = engine.deepspeed.optimizer
    if getattr(wrapper, "swap_optimizer", False) or hasattr(wrapper, "fp32_groups_flat"):
        raise unreadable()
    return [_Masters, _Flat, _Flat, _Sharded][engine.stage](engine)


class _Masters:
    """The masters with their optimizer states, addressed by the model's parameters. This one: stage 0."""

    def __init__(self, engine: Engine) -> None:
        self.wrapper: Any = engine.deepspeed.optimizer  # DeepSpeed's, round the torch optimizer
        self.optimizer: Any = engine.deepspeed.basic_optimizer
        lists = [getattr(self.wrapper, name, None) for name in GROUPS]
        groups = next((found for found in lists if found is not None), [[master for _, master in self.groups()]])
        self.parameters = [parameter for group in groups for parameter in group]
        self.prepare()

    def groups(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Each master with its parameter group."""
        return [(group, master) for group in self.optimizer.param_groups for master in group["params"]]

    def prepare(self) -> None:
        """Find the master of each parameter; in fp32 it is its own."""
        masters = [master for _, master in self.groups()]
        self._of = dict(zip(map(id, self.parameters), masters, strict=True))

    def make(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let the optimizer have a state for exactly these parameters, all of which is written afterwards."""
        wanted = {id(self._of[id(parameter)]) for parameter in parameters}
        for group, master in self.groups():
            if id(master) not in wanted:
                self.optimizer.state.pop(master, None)
            elif not self.optimizer.state.get(master):
                _make_state(self.optimizer, group, master)

    def state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of the parameter's master."""
        return self.optimizer.state.get(self._of[id(parameter)], {})

    def keys(self, parameter: nn.Parameter) -> list[str]:
        """The keys of a parameter, in the same order on every worker."""
        return [WEIGHT, *sorted(key for key, value in self.state(parameter).items() if value is not None)]

    def check(self, name: str, parameter: nn.Parameter) -> None:
        """Raise CheckpointError where the parameter has no master; every worker must ask."""
        if not any(parameter is one for one in self.parameters):
            raise CheckpointError(
                f"`{name}` requires a gradient, but the optimizer does not have it, so its state can't be saved",
                fix="give it to the optimizer, or freeze it before the optimizer is made",
            )

    def read(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """A whole tensor of a parameter; every worker must ask."""
        return self._of[id(parameter)] if key == WEIGHT else torch.as_tensor(self.state(parameter)[key])

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """The context in which `write` may be called."""
        yield

    def write(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set a whole tensor; every worker must. The weight is set both in fp32 and as the model computes with it."""
        if key == WEIGHT:
            self._of[id(parameter)].copy_(value)
            parameter.copy_(value)
        else:
            _set(self.state(parameter), key, value)


class _Flat(_Masters):
    """ZeRO 1 and 2: a flat master for each group, of which every worker has its share; the weights are whole."""

    def prepare(self) -> None:
        """Let DeepSpeed find the state of every group (ZeRO-3 does so each time that it is asked).

        0.19.8 does so after the first group's first step, when the others have no state yet, and then never
        again. The names are private: where they are gone, so is the mistake.
        """
        if self.optimizer.state.get(self.groups()[0][1]) and hasattr(self.wrapper, "_hp_optimizer_states_linked"):
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def make(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let the optimizer have a state for all parameters, if it needs one for some."""
        for group, master in self.groups() if parameters else []:
            if not self.optimizer.state.get(master):
                _make_state(self.optimizer, group, master)
        self.prepare()

    def state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of the first master: all have taken the same steps."""
        return self.optimizer.state.get(self.groups()[0][1], {})

    def check(self, name: str, parameter: nn.Parameter) -> None:
        """Compare the master with the model's weight: under `round_robin_gradients` DeepSpeed gives another's."""
        super().check(name, parameter)
        weight = self.read(parameter, WEIGHT).to(parameter.dtype)
        if not torch.allclose(weight, whole(parameter), rtol=0, atol=0, equal_nan=True):
            raise CheckpointError(
                f"DeepSpeed gives an fp32 weight of `{name}` that is not the one the model computes with",
                fix="leave `round_robin_gradients` out of `deepspeed.zero_optimization`",
            )

    def read(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """A whole tensor, put together from the workers' shares."""
        from deepspeed import utils

        if key == WEIGHT:
            found = utils.safe_get_full_fp32_param(parameter)
        elif _is_number(number := self.state(parameter)[key]):
            found = torch.as_tensor(number)
        else:
            found = utils.safe_get_full_optimizer_state(parameter, key)
        if found is None:
            raise unreadable()
        return found

    def write(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set this worker's share of a tensor, or a number of every master."""
        if key == WEIGHT:
            self.write_weight(parameter, value)
        elif not _is_number(self.state(parameter)[key]):
            self.write_state(parameter, key, value)
        elif not value.ndim:
            for _, master in self.groups():
                _set(self.optimizer.state[master], key, value)

    def write_weight(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Set the fp32 weight, and the one the model computes with, which ZeRO renews only at its next step."""
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)
        parameter.copy_(value)

    def write_state(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set a piece of the optimizer's state."""
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)


class _Sharded(_Flat):
    """ZeRO-3: every worker has its share of the weights too. The last share is padded, and DeepSpeed's functions
    that set whole tensors fail on that, so each worker cuts its own."""

    def groups(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Each master with its parameter group; a group may have several."""
        owner, groups = self.wrapper.sub_group_to_group_id, self.optimizer.param_groups
        return [(groups[owner[at]], flat) for at, flat in enumerate(self.wrapper.fp32_partitioned_groups_flat)]

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Within it no parameter is whole; afterwards those are that DeepSpeed keeps so."""
        self.wrapper.checkpoint_event_prologue()
        yield
        self.wrapper.checkpoint_event_epilogue()

    def write_weight(self, parameter: Any, value: torch.Tensor) -> None:
        """Set this worker's share of the fp32 weight and of the one the model computes with."""
        from deepspeed.utils import safe_set_local_fp32_param

        own = _share(parameter, value)
        safe_set_local_fp32_param(parameter, own)
        parameter.ds_tensor.copy_(own)

    def write_state(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Set this worker's share of a piece of the optimizer's state."""
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, _share(parameter, value), key)


def _share(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This worker's share of a whole tensor under ZeRO-3, padded with zeros."""
    size = parameter.ds_tensor.ds_numel
    begin = size * torch.distributed.get_rank(parameter.ds_process_group)
    own = value.flatten()[begin : begin + size]
    return torch.nn.functional.pad(own, (0, size - own.numel()))


def _is_number(value: Any) -> bool:
    return not torch.is_tensor(value) or value.ndim == 0


def _set(state: dict[str, Any], key: str, value: torch.Tensor) -> None:
    """Set an entry of an optimizer's state, keeping its type and device."""
    if torch.is_tensor(state[key]):
        state[key].copy_(value)
    else:
        state[key] = type(state[key])(value.item())


@torch.no_grad()
def _make_state(optimizer: Any, group: Mapping[str, Any], master: torch.Tensor) -> None:
    """Let the optimizer make its state for one master, by a step with rate 0 and gradient 0: nothing else does."""
    groups, gradient = optimizer.param_groups, master.grad
    optimizer.param_groups = [{**group, "params": [master], "lr": 0.0}]
    master.grad = torch.zeros_like(master)
    try:
        optimizer.step()
    finally:
        optimizer.param_groups, master.grad = groups, gradient
