"""Engines of `ptrain spec-decode generate`: what writes on from prompts. Importing this imports nothing heavy.

An engine of another package is a subclass of `Engine`, which an entry point of the group `ptrain_spec_decode.engine`
names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ptrain

GROUP = "ptrain_spec_decode.engine"
OWN: Mapping[str, str] = {
    "transformers": "ptrain_spec_decode.engines.transformers:Transformers",
    "openai": "ptrain_spec_decode.engines.openai:OpenAI",
    "vllm": "ptrain_spec_decode.engines.vllm:VLLM",
}


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        key: no other request has it; the same one when a call is made again.
        prompt: token ids.
        seed: of this request, below 2^31.
    """

    key: str
    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Answer:
    """What became of a request: tokens, or a reason why there are none.

    Attributes:
        key: of the request.
        tokens: what was written after the prompt.
        failed: why nothing was.
        used: tokens that were read and written for it.
    """

    key: str
    tokens: list[int] = field(default_factory=list)
    failed: str = ""
    used: int = 0


@dataclass(frozen=True)
class Settings:
    """What an engine is to do.

    Attributes:
        model: the name of the base.
        tokenizer: its tokenizer.
        new_tokens: to write after each prompt, whatever they are: nothing ends a text.
        temperature, top_k, top_p: how they are sampled; `top_k` 0 is all of them, `temperature` 0 is greedy.
        seed: of the whole call.
        options: the flags of its own that were given, by name.
    """

    model: str
    tokenizer: Any
    new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


class Engine:
    """Writes on from prompts."""

    options: ClassVar[frozenset[str]] = frozenset()
    """The flags that it takes besides those of every engine; another one is an error, never left unread."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def option(self, name: str, default: Any) -> Any:
        """A flag that was given, or what holds without it."""
        found = self.settings.options.get(name)
        return default if found is None else found

    def start(self) -> None:
        """Called once before the first request.

        Raises:
            PtrainError: it can't do what is asked of it.
        """

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer to each request, in any order, as soon as it is there; take requests when they can be worked on.

        Raises:
            PtrainError: no request could be answered, now or later.
        """
        raise NotImplementedError


def engine_class(name: str) -> type[Engine]:
    """The engine of this name: one of this package's, or of another one's.

    Raises:
        PluginError: there is none, or it can't be imported.
    """
    others = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    try:
        if name in OWN:
            module, _, attribute = OWN[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name in others:
            return others[name].load()
    except ImportError as error:
        raise ptrain.PluginError(f"the engine `{name}` can't be imported: {error}") from error
    known = ", ".join(f"`{one}`" for one in sorted({*OWN, *others}))
    raise ptrain.PluginError(f"there is no engine `{name}`", expected=f"one of {known}")
