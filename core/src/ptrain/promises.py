"""The kinds of result that stages promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from ptrain.results import Loss


def fits(stage: str, result: Any) -> bool:
    """Whether `result` is of the kind that a stage of the kind "first" promises; classes go by name, not by import."""
    wanted = RETURNS.get(stage)
    if callable(wanted):
        return bool(wanted(result))
    return wanted is None or any(cls.__name__ in wanted for cls in type(result).__mro__)


def _is_loss(result: Any) -> bool:
    return isinstance(result, Loss) or getattr(result, "ndim", None) == 0  # a scalar: the mean over samples


def said(result: Any) -> str:
    """A result in a few words: its class, and the shape of a tensor or the keys of a mapping."""
    if hasattr(result, "shape"):
        return f"{type(result).__name__} {list(result.shape)}"
    keys = f" with the keys {list(result)[:5]}" if isinstance(result, Mapping) else ""
    return f"{type(result).__name__}{keys}"


RETURNS: Mapping[str, tuple[str, ...] | Callable[[Any], bool]] = {
    "create_tokenizer": callable,
    "load": ("Dataset",),
    "split": lambda result: isinstance(result, Mapping) and {"train", "eval"} <= set(result),
    "process": ("Dataset",),
    "create_dataloader": lambda result: hasattr(result, "__iter__"),
    "create_config": ("PretrainedConfig", "PreTrainedConfig"),
    "create_model": ("Module",),
    "create_optimizer": ("Optimizer",),
    "create_scheduler": lambda result: hasattr(result, "get_last_lr") and hasattr(result, "step"),
    "create_engine": callable,
    "count": lambda result: isinstance(result, Mapping),
    "forward": ("Tensor",),
    "token_logprobs": ("Tensor",),
    "token_nll": ("Tensor",),
    "token_argmax": ("Tensor",),
    "token_kl": ("Tensor",),
    "sequence_sum": ("Tensor",),
    "step": ("StepResult",),
    "prepare_batch": lambda result: isinstance(result, Mapping),
    "loss": _is_loss,
    "evaluate": lambda result: isinstance(result, Mapping),
    "checkpoint": lambda result: isinstance(result, PathLike),
}
"""What the result of a stage is told by: the name of its class or of a base of it, or a test."""
