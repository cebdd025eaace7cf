"""bf16 with fp32 master weights at every ZeRO stage, and gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import losses, run_workers


@pytest.mark.parametrize("workers", [1, 2])
def test_bf16_follows_fp32(workers: int, recipes: Any, prepared: Any) -> None:
    """The losses stay within what bf16 can tell of those in fp32, at ZeRO 0 to 3."""
    common: dict[str, Any] = {"micro_batch_size": 4 // workers, "optimizer": {"lr": 1e-3}, "epochs": 2}
    exact = prepared(recipes(**common))
    rounded = [
        prepared(recipes(**common, model={"dtype": "bf16"}, deepspeed={"zero_optimization": {"stage": stage}}))
        for stage in range(4)
    ]
    run_workers([exact, *rounded], workers)
    for spec in rounded:
        torch.testing.assert_close(losses(spec), losses(exact), atol=0.05, rtol=0)
        assert losses(spec) != losses(exact)


def test_activation_checkpointing_changes_nothing(recipes: Any, prepared: Any) -> None:
    """Recomputed activations give the same losses, with packing and dropout too."""
    specs = [
        prepared(
            recipes(
                data={"pack_samples": True, "max_length": 128, "overlength": "drop"},
                model={"disable_activation_checkpoint": off, "hf_config_kwargs": {"attention_dropout": 0.1}},
            )
        )
        for off in (True, False)
    ]
    run_workers(specs, 1)
    torch.testing.assert_close(losses(specs[0]), losses(specs[1]), atol=1e-6, rtol=0)
