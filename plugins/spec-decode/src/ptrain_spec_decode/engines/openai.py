"""The engine `openai`: any server with OpenAI's completions."""

from __future__ import annotations

from typing import Any

from ptrain_spec_decode.engines import Answer, Request
from ptrain_spec_decode.engines.http import Server, Unanswered, choice, used


class OpenAI(Server):
    """Sends text and gets text, which is tokenised here.

    Its tokens may be others than those that the model wrote, and a text ends where the model ends it. Where the server
    is vLLM, the engine `vllm` gets the tokens themselves.
    """

    def body(self, request: Request) -> dict[str, Any]:
        """What OpenAI's API knows."""
        settings = self.settings
        return {
            "model": self.model,
            "prompt": settings.tokenizer.decode(request.prompt, skip_special_tokens=False),
            "max_tokens": settings.new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": request.seed,
        }

    def read(self, request: Request, found: dict[str, Any]) -> Answer:
        """The tokens of the text."""
        text = choice(found).get("text")
        if not isinstance(text, str) or not text:
            raise Unanswered("the answer holds no text")
        tokens = self.settings.tokenizer(text, add_special_tokens=False)["input_ids"][: self.settings.new_tokens]
        return Answer(request.key, list(tokens), used=used(found, len(request.prompt) + len(tokens)))
