"""`huggingface`: the export that `AutoModelForCausalLM` loads, verified before it is put into place."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.errors import CheckpointError
from ptrain.parts import Checkpoint
from ptrain.recipe.sections import CheckpointConfig

if TYPE_CHECKING:
    import torch

    from ptrain.run import Run

TOLERANCE = {"fp32": 1e-4, "bf16": 0.15, "fp16": 0.02}
"""The largest difference of logits between the model in training and the export, by dtype."""
PROBE = 16
"""Tokens of the input on which both are compared."""


class HuggingFaceCheckpoint(Checkpoint):
    """Weights as safetensors, configuration, generation settings, tokenizer with its template, and a model card."""

    class Config(CheckpointConfig):
        """Keys of `huggingface`."""

        verify: bool = True
        """Load the export in a fresh process and compare its logits with those of the model in training."""
        max_shard_size: str = "5GB"
        """The largest file of weights."""

    _logits: torch.Tensor | None = None

    def save(self, run: Run, path: Path) -> None:
        """Gather the weights parameter by parameter; rank 0 writes them.

        Raises:
            CheckpointError: a weight is empty or not finite.
        """
        self._logits = _probe(run) if self.config.verify else None
        weights = gathered(run)
        if run.rank != 0:
            return
        check_weights(weights)
        model = run.model
        config = model.config
        model.config = clean(config, run)
        try:
            model.save_pretrained(path, state_dict=weights, max_shard_size=self.config.max_shard_size)
        finally:
            model.config = config
        generation_config(run).save_pretrained(path)
        run.tokenizer.save_pretrained(path)
        (path / "README.md").write_text(model_card(run), encoding="utf-8")

    def verify(self, run: Run, path: Path) -> None:
        """Raise CheckpointError if the export does not load in a fresh process, or gives other logits."""
        if self._logits is None:
            return
        from safetensors.torch import load_file

        ids = probe_ids(run)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "ptrain.checkpoint.reload", str(path), json.dumps(ids)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        result = path / "logits.safetensors"
        if done.returncode or not result.exists():
            raise CheckpointError(f"the export does not load again: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        found = load_file(result)["logits"]
        result.unlink()
        difference = (found.float() - self._logits.float()).abs().max().item()
        scale = max(1.0, self._logits.float().abs().max().item())
        if not difference <= TOLERANCE[run.recipe.model.dtype] * scale:
            raise CheckpointError(
                f"the export gives other logits than the model in training (by {difference:.2g})",
                fix="report this with the recipe; `verify: false` exports without the check",
            )


def probe_ids(run: Run) -> list[int]:
    """A fixed input for comparing models."""
    size = run.hf_config.get_text_config().vocab_size
    return [(7 * n + 1) % min(size, len(run.tokenizer)) for n in range(PROBE)]


def _probe(run: Run) -> torch.Tensor:
    """The logits of the model in training on the probe, [tokens, v]; every worker takes part."""
    import torch

    ids = torch.tensor([probe_ids(run)], device=run.device)
    with torch.no_grad():
        return run.engine(lambda: run.model(input_ids=ids, use_cache=False).logits)[0].cpu()


def gathered(run: Run) -> dict[str, torch.Tensor]:
    """The whole state dict on rank 0's CPU, one parameter at a time; tied weights once. Empty elsewhere."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for name, parameter in run.model.named_parameters():
        with _whole(run, parameter):
            if run.rank == 0:
                found[name] = parameter.detach().cpu().contiguous().clone()
    if run.rank == 0:
        persistent = run.model.state_dict(keep_vars=True)
        for name, value in persistent.items():
            if id(value) not in names and name not in found:
                found[name] = value.detach().cpu().contiguous().clone()
    return found


def _whole(run: Run, parameter: torch.nn.Parameter) -> Any:
    import contextlib

    if run.engine.stage != 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError where a weight is empty or not finite."""
    import torch

    for name, value in weights.items():
        if not value.numel():
            raise CheckpointError(f"the weight `{name}` is empty, so the export would be worthless")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"the weight `{name}` holds values that are not finite")


def clean(config: Any, run: Run) -> Any:
    """The configuration for others: nothing of ptrain's in it, caching on."""
    made = copy.deepcopy(config)
    made._attn_implementation = None
    made.use_cache = True
    return made


def generation_config(run: Run) -> Any:
    """Generation settings that stop at the end of a turn."""
    made = copy.deepcopy(run.model.generation_config)
    tokenizer = run.tokenizer
    if tokenizer.eos_token_id is not None:
        known = made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]
        stops = [token for token in dict.fromkeys([tokenizer.eos_token_id, *known]) if token is not None]
        made.eos_token_id = stops[0] if len(stops) == 1 else stops
    if tokenizer.pad_token_id is not None:
        made.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        made.bos_token_id = tokenizer.bos_token_id
    return made


def model_card(run: Run) -> str:
    """A README that says how the model was made."""
    from ptrain.versions import versions

    recipe = run.recipe
    base = recipe.model.name_or_path
    head = ["---", "library_name: transformers", "tags: [ptrain]"]
    head += [f"base_model: {base}"] if base and not Path(base).exists() else []
    made = f"fine-tuned from `{Path(base).name or base}`" if base else "trained from random weights"
    lines = [
        *head,
        "---",
        f"# {getattr(recipe.model, 'save_name', None) or run.dir.name}",
        "",
        f"Made by [ptrain](https://pypi.org/project/ptrain/) with the trainer `{recipe.type}`: {made}, "
        f"{run.progress.step} optimizer steps, {run.progress.tokens:,} tokens.",
        "",
        "| package | version |",
        "|---|---|",
        *(f"| {name} | {version} |" for name, version in versions().items() if name != "platform"),
        "",
    ]
    return "\n".join(lines)
