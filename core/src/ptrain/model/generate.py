"""Greedy generation, the same number of forward passes on every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedTokenizerBase


def greedy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    device: torch.device,
    stop_ids: Sequence[int],
    synchronised: bool,
) -> list[list[int]]:
    """The new tokens of each prompt, without the stop token, at most `max_new_tokens`.

    What the model's own generation settings say, such as a penalty for repetition, is left out: it would not be greedy.
    Prompts are padded on the left. With `synchronised` every worker goes on until the last one is done, which
    ZeRO-3 needs, since each forward pass gathers weights from all of them.
    """
    import torch
    from transformers import GenerationConfig

    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else stop_ids[0]
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": pad,
        "eos_token_id": list(stop_ids), "synced_gpus": synchronised, "use_cache": True,
        "temperature": None, "top_p": None, "top_k": None,
    }  # fmt: skip
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.no_grad():
            out = model.generate(ids.to(device), attention_mask=mask.to(device), **options)
    finally:
        model.generation_config = settings
    return [_until(row[longest:], stop_ids) for row in out.tolist()]


def _until(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    for at, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:at]
    return tokens
