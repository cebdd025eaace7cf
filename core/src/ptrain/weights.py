"""Weights read, written and gathered whole, wherever ZeRO keeps them."""

from __future__ import annotations

from typing import Any

import torch

from ptrain.errors import CheckpointError


def whole(parameter: Any) -> torch.Tensor:
    """The whole weight that the model computes with, on its device and in its dtype; every worker must ask.

    DeepSpeed's own way would give rounded weights under `torch_autocast`.

    Raises:
        CheckpointError: DeepSpeed keeps it on NVMe.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    own = parameter.ds_tensor
    if own.numel() != own.ds_numel:
        raise unreadable()
    group = parameter.ds_process_group
    count = torch.distributed.get_world_size(group)
    found = torch.empty(count * own.ds_numel, dtype=own.dtype, device=parameter.device)
    torch.distributed.all_gather_into_tensor(found, own.detach().to(parameter.device).contiguous(), group=group)
    return found[: parameter.ds_numel].view(parameter.ds_shape)


@torch.no_grad()
def assign(parameter: Any, value: torch.Tensor) -> None:
    """Write the whole `value`, which every worker has, into a parameter; before there is an engine.

    Each worker keeps its own shard of it where ZeRO-3 has cut the parameter up.

    Raises:
        CheckpointError: DeepSpeed keeps it on NVMe.
    """
    if not hasattr(parameter, "ds_tensor"):
        parameter.copy_(value)
        return
    own = parameter.ds_tensor
    if own.numel() != own.ds_numel:
        raise unreadable()
    start = torch.distributed.get_rank(parameter.ds_process_group) * own.ds_numel
    part = value.reshape(-1)[start : start + own.ds_numel]  # the last shard is padded
    own[: part.numel()].copy_(part)
    if parameter.numel() == parameter.ds_numel:  # it is gathered at this moment
        parameter.copy_(value)


def gather_together(module: torch.nn.Module) -> None:
    """Have ZeRO-3 gather all weights below `module` whenever it is called, and not those of what it calls.

    Workers may then call what is in it unequally often. To be told before there is an engine.
    """
    from ptrain.engine import gather_whole

    gather_whole(module)


def unreadable() -> CheckpointError:
    """The error where a weight or its state can't be had."""
    return CheckpointError(
        "DeepSpeed keeps the state on NVMe, or packs it in an order of its own, where it can't be read",
        fix="offload to `cpu` instead of `nvme`; with FusedAdam in bf16 or fp16 use ZeRO stage 1 or above",
    )
