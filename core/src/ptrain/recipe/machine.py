"""What a recipe needs and this machine lacks: a warning of `check`, an error of `run`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ptrain.errors import Problem
from ptrain.recipe.load import Loaded

PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""Attention implementations that are packages of their own: module and distribution."""
TRACKERS = ("tensorboard", "wandb")
"""Trackers whose package, of the same name, is an extra."""
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA's and AMD's drivers, and of either under WSL."""
GPU_OPTIMIZERS = ("fused_adam",)


def machine_problems(loaded: Loaded) -> list[Problem]:
    """What `loaded` needs that is not here. Looks at installed modules and device files; no torch."""
    found = []
    attention = getattr(loaded.recipe.model, "attn_implementation", None)
    where = loaded.document.value_position(("model", "attn_implementation"))
    if attention in PACKAGES:
        module, package = PACKAGES[attention]
        if importlib.util.find_spec(module) is None:
            found.append(
                Problem(f"`model.attn_implementation` is `{attention}`, and {package} is not installed here", where,
                        fix=f"pip install {package}, or add `-o model.attn_implementation=sdpa`")
            )  # fmt: skip
        elif not has_gpu():
            found.append(
                Problem(f"`model.attn_implementation` is `{attention}`, and there is no GPU here", where,
                        fix="add `-o model.attn_implementation=sdpa`")
            )  # fmt: skip
    optimizer = loaded.recipe.optimizer.type.rpartition(":")[2]
    if optimizer in GPU_OPTIMIZERS and not has_gpu():
        where = loaded.document.value_position(("optimizer", "type"))
        found.append(
            Problem(f"the optimizer `{optimizer}` needs a GPU, and there is none here", where,
                    fix="add `-o optimizer.type=adamw`")
        )  # fmt: skip
    if loaded.recipe.model.dtype == "fp16" and not has_gpu():
        where = loaded.document.value_position(("model", "dtype"))
        found.append(
            Problem("`model.dtype` is `fp16`, which needs a GPU, and there is none here", where,
                    fix="add `-o model.dtype=bf16`")
        )  # fmt: skip
    for key, package in (("peft_config", "peft"), ("quantization_config", "bitsandbytes")):
        if getattr(loaded.recipe.model, key, None) and importlib.util.find_spec(package) is None:
            where = loaded.document.keys.get(("model", key))
            found.append(
                Problem(f"`model.{key}` needs the package {package}, which is not installed here", where,
                        fix=f"pip install {package}")
            )  # fmt: skip
    wanted = {entry.type.rpartition(":")[2] for entry in loaded.recipe.trackers}
    wanted |= {"wandb"} if loaded.recipe.wandb.enable else set()
    for package in TRACKERS:
        if package in wanted and importlib.util.find_spec(package) is None:
            where = loaded.document.value_position(("trackers",) if "trackers" in loaded.document.data else (package,))
            found.append(
                Problem(f"metrics are to go to {package}, which is not installed here", where,
                        fix=f"pip install {package}")
            )  # fmt: skip
    return found


def has_gpu() -> bool:
    """Whether a GPU's driver is loaded."""
    return any(Path(device).exists() for device in GPU_DEVICES)
