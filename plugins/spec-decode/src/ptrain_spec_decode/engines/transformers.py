"""The engine `transformers`: the base itself, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import ptrain
from ptrain_spec_decode.engines import Answer, Engine, Request

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Transformers(Engine):
    """A batch at a time; a text depends on the seed and its prompt, whatever batch it is in, but for rounding."""

    options = frozenset({"batch_size", "dtype", "device", "top_k", "top_p"})

    def start(self) -> None:
        """Load the model.

        Raises:
            ModelError: it can't be loaded, or there is no such device.
        """
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        from ptrain.hub import explained

        disable_progress_bar()
        device = self.option("device", "cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, DTYPES[self.option("dtype", "fp32" if device == "cpu" else "bf16")])
        with explained("model", self.settings.model):
            model: Any = AutoModelForCausalLM.from_pretrained(self.settings.model, dtype=dtype, use_safetensors=True)
        try:
            self._model = model.to(device).eval()
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            said = str(error).splitlines()[0]
            raise ptrain.ModelError(f"the model can't be put on the device `{device}`: {said}") from error

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Of one batch after the other.

        Raises:
            ModelError: a batch is too large for the memory of the device.
        """
        iterator = iter(requests)
        while batch := list(islice(iterator, self.option("batch_size", 32))):
            for request, tokens in zip(batch, self._written(batch).tolist(), strict=True):
                yield Answer(request.key, tokens, used=len(request.prompt) + len(tokens))

    def _written(self, batch: list[Request]) -> torch.Tensor:
        import torch

        from ptrain_spec_decode.sampling import Warp, generate, refuse_beyond_positions, uniforms

        settings = self.settings
        longest = max(len(request.prompt) for request in batch)
        refuse_beyond_positions(self._model, longest, settings.new_tokens, "--new-tokens or --prompt-length")
        draws = uniforms(settings.seed, [request.key for request in batch], settings.new_tokens)
        warp = Warp(settings.temperature, settings.top_k, settings.top_p)
        try:
            return generate(self._model, [request.prompt for request in batch], draws, warp).tokens
        except torch.cuda.OutOfMemoryError as error:
            raise ptrain.ModelError(
                f"{len(batch)} prompts at a time are too many for the memory of the device",
                fix="lower --batch-size; the same call goes on where this one stops",
            ) from error
