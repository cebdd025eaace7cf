"""`huggingface`: the export that transformers loads, verified before it is put into place."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ptrain.errors import CheckpointError, PtrainError
from ptrain.launch import guard
from ptrain.model import adapters
from ptrain.parts import Checkpoint
from ptrain.recipe.sections import CheckpointConfig

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from ptrain.run import Run

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
"""How far the export's logits may be from those of the model in training, as a share of the largest, by dtype."""
PROBE = 16
"""Tokens of the input on which both are compared."""
PROCESS_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
"""What both tokenizers make a prompt of."""
ANSWER = "ptrain"
"""What an assistant says where the template is asked how it ends a turn."""


class HuggingFaceCheckpoint(Checkpoint):
    """Weights as safetensors, configuration, generation settings, tokenizer with its template, and a model card."""

    class Config(CheckpointConfig):
        """Keys of `huggingface`."""

        verify: bool = True
        """Load the export in a fresh process and compare its logits with those of the model in training."""
        max_shard_size: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[KMGT]B$")] = "5GB"
        """The largest file of weights, e.g. `500MB`."""

    folder = "model"
    _logits: torch.Tensor | None = None

    def save(self, run: Run, path: Path) -> None:
        """Gather the weights parameter by parameter; rank 0 writes them, in the dtype of training.

        Of a model with an adapter only that is written.

        Raises:
            CheckpointError: a weight is empty or not finite.
        """
        self._logits = probe_logits(run) if self.config.verify else None
        adapted = adapters.adapter_of(run.model) is not None
        weights = gathered(run, trained_only=adapted)
        if run.rank != 0:
            return
        check_weights(weights)
        self.write(run, path, weights)

    def write(self, run: Run, path: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write the gathered weights and what belongs to them; on rank 0 alone."""
        with _for_others(run) as model:
            if adapters.adapter_of(run.model) is not None:
                adapters.save(model, path, weights)
            else:
                model.save_pretrained(path, state_dict=weights, max_shard_size=self.config.max_shard_size)
        run.tokenizer.save_pretrained(path)
        (path / "README.md").write_text(model_card(run), encoding="utf-8")

    def verify(self, run: Run, path: Path) -> None:
        """Raise CheckpointError if the export does not load in a fresh process, or gives other logits."""
        if self._logits is None:
            return
        expected, self._logits = self._logits.float(), None
        reloaded = _reloaded(run, path)
        self._compare_prompts(run, reloaded.get("prompt"))
        found = reloaded["logits"]
        difference = (found.float() - expected).abs().max() / expected.abs().max()
        tolerance = TOLERANCE[run.recipe.model.dtype]
        if not difference <= tolerance:
            raise CheckpointError(
                f"the export `{path}` gives other logits than the model in training: they differ by "
                f"{difference.item():.2g} of the largest",
                expected=f"at most {tolerance:g}",
                fix="report this with the recipe; `verify: false` exports without the check",
            )

    def _compare_prompts(self, run: Run, found: torch.Tensor | None) -> None:
        """Warn where whoever loads the export asks the model in another way than it was trained to be asked."""
        from ptrain.data.encode import Encoder
        from ptrain.data.render import Template, Unrenderable

        if found is None:
            return
        try:
            (trained,) = Encoder(run.tokenizer).ids([Template(run.tokenizer).prompt(ASKED)])
        except (Unrenderable, PtrainError):
            return
        if found.tolist() != trained:
            run.warn(
                "the exported tokenizer does not write prompts as they were in training: "
                f"{run.tokenizer.decode(found)!r} instead of {run.tokenizer.decode(trained)!r}"
            )


def probe_ids(run: Run) -> list[int]:
    """A fixed input for comparing models."""
    size = min(run.hf_config.get_text_config().vocab_size, len(run.tokenizer))
    return [(7 * n + 1) % size for n in range(PROBE)]


def probe_logits(run: Run) -> torch.Tensor:
    """The logits of the model in training on the probe, [tokens, v], or its hidden states where it has no output layer;
    every worker takes part."""
    import torch

    from ptrain.checkpoint.reload import answer

    ids = torch.tensor([probe_ids(run)], device=run.device)
    with torch.no_grad():
        return run.engine(lambda: answer(run.model, ids)).cpu()


def _reloaded(run: Run, path: Path) -> dict[str, torch.Tensor]:
    """`logits` of the export, and `prompt`, the ids that its tokenizer makes of a question if it has a template.

    In a process of its own, on the CPU and without the network.
    """
    from safetensors.torch import load_file

    kept = {key: value for key, value in os.environ.items() if key not in PROCESS_GROUP}
    env = {**kept, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    trusted = getattr(run.recipe.model, "trust_remote_code", False)
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder, "asked.json"), Path(folder, "logits.safetensors")
        conversation = ASKED if run.tokenizer.chat_template else None
        question = {
            "ids": probe_ids(run), "trust_remote_code": trusted, "conversation": conversation,
            "dtype": run.recipe.model.dtype, "rounded": getattr(run.recipe.model, "quantization_config", {}),
            "module": run.parts.model.registered_by, "auto": run.parts.model.auto(run.hf_config),
        }  # fmt: skip
        asked.write_text(json.dumps(question), encoding="utf-8")
        command = guard.guarded([sys.executable, "-m", "ptrain.checkpoint.reload", str(path), str(asked), str(out)])
        # A session of its own: Ctrl-C asks this run to stop, and must not break what it saves meanwhile.
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, start_new_session=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise CheckpointError(f"the export `{path}` does not load again: {last}")
        return load_file(out)


def gathered(run: Run, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """`run.weights()` on rank 0's CPU; empty elsewhere."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in run.weights(trained_only=trained_only):
        if run.rank == 0:
            found[name] = _copied(weight)
    return found


def _copied(value: torch.Tensor) -> torch.Tensor:
    import torch

    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError where a weight is empty or not finite."""
    for name, value in weights.items():
        if not value.numel():
            raise CheckpointError(f"the weight `{name}` is empty, so the export would be worthless")
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(
                f"the weight `{name}` holds values that are not finite",
                fix="go on from an earlier checkpoint, with a lower `optimizer.lr`",
            )


@contextlib.contextmanager
def _for_others(run: Run) -> Any:
    """The model with the settings that others should find, until they are written."""
    model = run.model
    # A body without a head has no settings for generation.
    config, generation = model.config, getattr(model, "generation_config", None)
    model.config = clean(config)
    if generation is not None:
        model.generation_config = generation_config(generation, run.tokenizer)
    try:
        yield model
    finally:
        model.config = config
        if generation is not None:
            model.generation_config = generation


def clean(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration for others: nothing of ptrain's in it, caching on."""
    made = copy.deepcopy(config)
    made._attn_implementation = None
    made.use_cache = True
    return made


def generation_config(old: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation settings that stop at the end of a turn and pad with the tokenizer's token."""
    from transformers import GenerationConfig

    known = old.eos_token_id if isinstance(old.eos_token_id, list) else [old.eos_token_id]
    stops = [tokenizer.eos_token_id, end_of_turn(tokenizer), *known]
    stops = [stop for stop in dict.fromkeys(stops) if stop is not None]
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    made = copy.deepcopy(old)
    made.update(**{name: value for name, value in ids.items() if value is not None})
    try:
        made.validate(strict=True)
    except ValueError:
        # Some published models set a temperature but no sampling; transformers refuses to save that.
        return GenerationConfig(**ids)
    return made


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts right after what the assistant says, if it does."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        # A template may want tools, a system prompt, or other roles.
        return None
    after = tokenizer(text.rpartition(ANSWER)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    return after[0] if after and after[0] in special else None


def model_card(run: Run) -> str:
    """A README that says how the model was made."""
    from ptrain.versions import versions

    recipe = run.recipe
    base = recipe.model.name_or_path
    adapter = adapters.adapter_of(run.model)
    head = ["---", f"library_name: {'transformers' if adapter is None else 'peft'}", "tags: [ptrain]"]
    head += [f"base_model: {base}"] if base and not Path(base).exists() else []
    made = f"fine-tuned from `{Path(base).name or base}`" if base else "trained from random weights"
    if adapter is not None:
        config: Any = adapter.peft_config["default"]
        made = f"an adapter ({config.peft_type.value}) for `{Path(base).name or base}`"
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
