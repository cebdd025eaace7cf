"""Workers that train a small model whose MLPs are computed in unequally many tiles, by every way to keep activations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ptrain import engine as engines
from ptrain.weights import whole
from ptrain_sequence_parallel import mlp

TOKENS, WORKERS, LENGTHS = 5, 2, (17, 2)
"""Of a tile; and of the rows of each worker, of which the second has one tile."""


@dataclass(frozen=True)
class Case:
    """A ZeRO stage, how layers keep their activations, and whether an adapter is trained instead of the model."""

    stage: int
    checkpoint: str = "kept"
    adapter: bool = False


CASES = {
    f"ZeRO {stage}, {checkpoint}{', adapter' * adapter}": Case(stage, checkpoint, adapter)
    for stage, checkpoint, adapter in [
        (0, "kept", False), (0, "reentrant", False), (0, "non-reentrant", False), (0, "non-reentrant", True),
        (1, "kept", False), (2, "kept", False), (2, "non-reentrant", False), (3, "kept", False), (3, "reentrant", False), (3, "non-reentrant", False),
        (3, "non-reentrant", True),
    ]
}  # fmt: skip


def made(adapter: bool, dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    """A small Llama; with an adapter, that alone is trained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    if adapter:
        from ptrain.model import adapters

        adapters.attach(model, {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}, "", None)
    return model


def keep(model: Any, checkpoint: str) -> None:
    """Have the layers of a model keep their activations, or compute them again in one of two ways."""
    if checkpoint != "kept":
        model.gradient_checkpointing_enable({"use_reentrant": checkpoint == "reentrant"})
        model.enable_input_require_grads()


def loss(model: Any, rank: int) -> torch.Tensor:
    """A sum over the hidden states of this worker's rows."""
    drawn = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 37, (2, LENGTHS[rank]), generator=drawn)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return (hidden * torch.randn(hidden.shape, generator=drawn)).sum()


def train(folder: Path) -> None:
    """Take two steps of every case; rank 0 writes losses and weights."""
    engines.start("cpu", 0)
    rank = torch.distributed.get_rank()
    for name, case in CASES.items():
        found = learnt(case, rank)
        if rank == 0:
            save_file(found, folder / f"{name}.safetensors")


def learnt(case: Case, rank: int) -> dict[str, torch.Tensor]:
    model, said = made(case.adapter), []
    keep(model, case.checkpoint)
    mlp.tile(model, TOKENS, True, said.append)
    if said != ["MLPs are computed 5 tokens at a time (2 of them)"]:
        raise RuntimeError(f"said {said}")
    zero = {"stage": case.stage, "stage3_param_persistence_threshold": 0}
    config = {
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": None,
    }  # fmt: skip
    engine = engines.Engine(model, sgd(model), config, 0.0)
    engine.train()
    losses = []
    for _ in range(2):
        value = engine(lambda: loss(model, rank))
        engine.backward(value)
        engine.update()
        losses.append(value.detach())
    return {"losses": torch.stack(losses), **{name: whole(p).clone() for name, p in model.named_parameters()}}


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def expected(case: Case) -> dict[str, torch.Tensor]:
    """The same without tiles, of all workers' rows in one process; the losses are rank 0's."""
    model = made(case.adapter).train()
    optimizer, losses = sgd(model), []
    for _ in range(2):
        optimizer.zero_grad()
        first, *others = (loss(model, rank) for rank in range(WORKERS))
        sum(others, start=first).backward()
        optimizer.step()
        losses.append(first.detach())
    return {"losses": torch.stack(losses), **{name: p.detach() for name, p in model.named_parameters()}}
