"""The optimizers that ship with core."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ptrain.errors import ModelError
from ptrain.parts import Optimizer
from ptrain.recipe.sections import OptimizerConfig

if TYPE_CHECKING:
    import torch

    from ptrain.run import Run

NO_DECAY = re.compile(r"(bias|norm(_[a-z0-9]+)?\.weight|\bln_[a-z0-9]+\.weight)$", re.IGNORECASE)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: parameters that decay, and biases and weights of norms, which do not.

    Raises:
        ModelError: no parameter requires a gradient.
    """
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rest if NO_DECAY.search(name) else decay).append(parameter)
    if not decay and not rest:
        raise ModelError("no parameter of the model requires a gradient", expected="at least one to train")
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class AdamW(Optimizer):
    """`adamw`: torch's AdamW, fused where the device has it; nothing is compiled."""

    class Config(OptimizerConfig):
        """Keys of `adamw`."""

        eps: Annotated[float, Field(gt=0)] = 1e-8
        """Added to the denominator."""

    def create(self, run: Run, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer over two parameter groups."""
        import torch

        config = self.config
        groups = parameter_groups(model, config.weight_decay)
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps,
            fused=run.device.type in ("cuda", "cpu"),
        )  # fmt: skip


class FusedAdam(Optimizer):
    """`fused_adam`: DeepSpeed's FusedAdam (compiles a CUDA kernel at its first use)."""

    class Config(AdamW.Config):
        """Keys of `fused_adam`."""

    def create(self, run: Run, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer over two parameter groups."""
        from deepspeed.ops.adam import FusedAdam

        config = self.config
        groups = parameter_groups(model, config.weight_decay)
        return FusedAdam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, adam_w_mode=True)


class CPUAdam(Optimizer):
    """`cpu_adam`: DeepSpeed's CPUAdam, for an offloaded optimizer (compiles at its first use)."""

    class Config(AdamW.Config):
        """Keys of `cpu_adam`."""

    def create(self, run: Run, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer over two parameter groups."""
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        config = self.config
        groups = parameter_groups(model, config.weight_decay)
        return DeepSpeedCPUAdam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
