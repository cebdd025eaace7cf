"""The key of prepared data: everything that changes the result, and nothing else.

That is the rows (by content), the tokenizer and its template, the `data` section without what only says where or how
fast, and the code that loads, splits and processes: distributions with their versions, the user's code by its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ptrain.parts import Trainer

if TYPE_CHECKING:
    from ptrain.recipe.config import Config
    from ptrain.run import Run

FORMAT = 5
"""Part of every key: raise it when the same input gives another result."""
NOT_PREPARED = frozenset(
    {
        "sources", "eval_sources", "num_proc", "dl_num_workers", "cache_dir", "fail_on_missing_cache", "div_length",
        "pad_to", "type",
    }
)  # fmt: skip
"""Keys of a section that never change prepared data; the sources are added one by one. A `Config` may name more of
its own in `not_prepared`."""
STAGES = ("create_tokenizer", "load", "split", "process")
"""The stages that make prepared data."""


def key(run: Run) -> str:
    """The name of the prepared data in the cache; for a tokenizer that is not made from the rows, creates it."""
    content = {
        "format": FORMAT,
        "data": _section(run.recipe.data),
        "sources": [_part(run, source) for source in run.parts.sources],
        "eval_sources": [_part(run, source) for source in run.parts.eval_sources],
        "tokenizer": _tokenizer(run),
        "code": list(_code(run)),
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _section(config: Config) -> Any:
    """A section without the keys that do not change prepared data."""
    return config.model_dump(mode="json", exclude={*NOT_PREPARED, *getattr(config, "not_prepared", ())})


def _part(run: Run, part: Any) -> Any:
    """A source: its class and version, its keys, its content."""
    offer = run.loaded.origins.get(type(part))
    return [str(offer), _section(part.config), part.fingerprint()]


def _tokenizer(run: Run) -> Any:
    """What the tokenizer is: what it is made from if that is the rows, its content otherwise."""
    part = run.parts.tokenizer
    recipe = getattr(part, "recipe", None)
    if recipe is not None:
        return recipe()
    run.tokenizer = run.call("create_tokenizer")
    return tokenizer_content(run.tokenizer)


def tokenizer_content(tokenizer: Any) -> Any:
    """The hash of a tokenizer's vocabulary and rules, its template, its special tokens, where it cuts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    # What cuts at the end, as nearly all do, is left out: prepared data has to be found by the key it had.
    side = [tokenizer.truncation_side] if tokenizer.truncation_side != "right" else []
    return [digest, tokenizer.chat_template, special, *side]


def _code(run: Run) -> Iterator[Any]:
    """The layers that have a part in preparing data, with their versions and their own keys."""
    for layer in run.stack.layers:
        events = {event.partition("-")[2] for event, _ in layer.callbacks}
        implemented = {stage for stage in STAGES if hasattr(getattr(layer.plugin, stage, None), "ptrain_impl")}
        if not implemented | (events & set(STAGES)):
            continue
        config: Any = getattr(layer.plugin, "config", None)
        version = run.loaded.user_code.sha256 if layer.user and run.loaded.user_code else layer.origin
        yield [
            layer.name,
            version,
            _section(config) if hasattr(config, "model_dump") else None,
            *_more(run, layer.plugin),
        ]


def _more(run: Run, plugin: Any) -> Iterator[Any]:
    """What a trainer says that its rows depend on besides."""
    if isinstance(plugin, Trainer) and (found := plugin.fingerprint(run)) is not None:
        yield found
