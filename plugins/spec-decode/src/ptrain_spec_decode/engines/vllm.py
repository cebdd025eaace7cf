"""The engine `vllm`: a vLLM server, which takes and gives tokens and ends no text."""

from __future__ import annotations

from typing import Any

from ptrain_spec_decode.engines import Answer, Request
from ptrain_spec_decode.engines.http import Server, Unanswered, choice, used


class VLLM(Server):
    """Sends tokens and gets the tokens that the model wrote, as many as were asked for."""

    options = Server.options | {"top_k"}
    key_variable = "VLLM_API_KEY"

    def body(self, request: Request) -> dict[str, Any]:
        """OpenAI's fields, and vLLM's own."""
        settings = self.settings
        return {
            "model": self.model,
            "prompt": request.prompt,
            "max_tokens": settings.new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "seed": request.seed,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def read(self, request: Request, found: dict[str, Any]) -> Answer:
        """The tokens themselves."""
        one = choice(found)
        tokens = one.get("token_ids")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise Unanswered("the answer holds no `token_ids`: vLLM gives them from version 0.10.2 on")
        if len(tokens) != self.settings.new_tokens:
            raise Unanswered(f"{len(tokens)} tokens were written, and {self.settings.new_tokens} were asked for")
        read = one.get("prompt_token_ids")
        if isinstance(read, list) and read != request.prompt:
            raise Unanswered("the server read another prompt than it was sent: is the tokenizer that of the model?")
        return Answer(request.key, tokens, used=used(found, len(request.prompt) + len(tokens)))
