"""Which parameters decay."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from ptrain.optimizers import parameter_groups


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gptj", "gpt_neo", "gpt_bigcode", "codegen", "mpt", "bert"])
def test_norms_and_biases_do_not_decay(kind: str) -> None:
    """Whatever a family calls its norms; everything else does."""
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    spared = {id(p) for norm in norms for p in norm.parameters()}
    spared |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    decays, rest = parameter_groups(model, 0.1)
    assert norms and {id(p) for p in rest["params"]} == spared
    assert decays["weight_decay"] == 0.1 and not rest["weight_decay"]
