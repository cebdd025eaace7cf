"""Attention within each document, registered with transformers under ptrain's own names.

Rows may hold several documents (packing) and padding. `ptrain_sdpa` computes attention by document: no block mask is
ever built, nothing is computed between documents or for padding, and the memory is that of the longest document.
Short documents of like length are computed in one call. Padding positions come out as zeros; nothing reads them.
`sdpa` in a recipe means this function during training; generation and the saved model use transformers' own.

Packed steps of 512 tokens take 1.23 times as long with a block mask instead (`benchmarks/tricks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptrain.errors import ModelError
from ptrain.model import dropped
from ptrain.model.layout import layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Attention = Callable[..., tuple[torch.Tensor, Any]]
NAME = "ptrain_sdpa"
TRACED = "ptrain_traced"
"""The name under which transformers finds, in a plan, the attention that is only counted."""
_per_document: ContextVar[bool] = ContextVar("ptrain_per_document", default=False)
_cut: ContextVar[bool] = ContextVar("ptrain_cut", default=False)
_plain_names: dict[str, str] = {}
_left_alone: set[str] = set()
"""The functions that torch leaves alone where it compiles; empty where nothing is compiled."""


class Documents:
    """The lengths of the documents of each row, as attention functions of ptrain are told.

    Torch, where it compiles, does not look into an object of this class; of lists it would compile for each anew.
    """

    def __init__(self, lengths: Sequence[Sequence[int]]) -> None:
        self.lengths = lengths


@contextmanager
def per_document(*, cut: bool = False) -> Iterator[None]:
    """Within it, models on `ptrain_sdpa` build no mask: each attention call gets `document_lengths`.

    Args:
        cut: the sequences are only parts, so that models on a function of `wrap` build no mask either.
    """
    tokens = _per_document.set(True), _cut.set(cut)
    try:
        yield
    finally:
        _per_document.reset(tokens[0])
        _cut.reset(tokens[1])


def plain_name(name: str | None) -> str | None:
    """The function of which transformers is given a wrapped one under `name`; `name` itself for any other."""
    return _plain_names.get(name or "", name)


def wrap(prefix: str, inner: str, around: Callable[[Attention], Attention]) -> str:
    """Register with transformers the attention function `around(plain)`, and return its name; see `ptrain.attention`.

    The name tells nothing of `inner`: transformers looks for parts of names, such as "flash".
    """
    known = [name for name, plain in _plain_names.items() if plain == inner and name.startswith(prefix)]
    name = known[0] if known else f"{prefix}_{len(_plain_names)}"
    mask, attend = ALL_MASK_ATTENTION_FUNCTIONS[inner], ALL_ATTENTION_FUNCTIONS[inner]

    def own_mask(*args: Any, **kwargs: Any) -> Any:
        return None if _cut.get() else mask(*args, **kwargs)

    def plain(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        # Flash attention asks the configuration which one it is.
        config = Seen(module.config, _attn_implementation=inner)
        return attend(Seen(module, config=config), *args, **kwargs)

    AttentionInterface.register(name, around(plain))
    AttentionMaskInterface.register(name, own_mask)
    _plain_names[name] = inner
    if _left_alone:
        leave_alone()
    return name


def leave_alone() -> None:
    """Have torch, where it compiles layers, leave functions alone that look at where documents begin."""
    from ptrain.model.varlen import VARLEN

    kernels = {name for name in ALL_ATTENTION_FUNCTIONS if name.startswith("flash_attention")}
    for name in {NAME, VARLEN, *kernels, *_plain_names} - _left_alone:
        plain = ALL_ATTENTION_FUNCTIONS[name]
        AttentionInterface.register(name, torch.compiler.disable(plain, reason="documents differ in every batch"))
        _left_alone.add(name)


class Seen:
    """`thing` with other values of some attributes."""

    def __init__(self, thing: Any, **attributes: Any) -> None:
        self._thing = thing
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thing, name)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return None if _per_document.get() else sdpa_mask(*args, **kwargs)


def is_causal(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a token of this layer sees none that follow it, as transformers' functions find out."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_lengths: Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of [b, heads, s, d] queries; returns [b, s, heads, d] like transformers' functions do."""
    if document_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs
        )
    whole, causal = query.shape[2], is_causal(module, kwargs)
    lengths = document_lengths.lengths
    if all(len(row) == 1 and (causal or row[0] == whole) for row in lengths):
        # One document a row: what is padded on the right is seen by nobody, and one call beats one for each row.
        return _one(module, query, key, value, sliding_window, kwargs), None
    plan = layout(tuple(map(tuple, lengths)), whole, query.device)
    # Cut once, so that the backward pass joins gradients once.
    parts = [plan.there(tensor.transpose(1, 2).flatten(0, 1)).split(plan.sizes) for tensor in (query, key, value)]
    pieces = []
    for group, *tensors in zip(plan.groups, *parts, strict=True):
        if not group.length:
            pieces.append(tensors[2].new_zeros(group.count, query.shape[1], value.shape[3]))
            continue
        q, k, v = (tensor.unflatten(0, (group.count, group.length)).transpose(1, 2) for tensor in tensors)
        inside = None if causal else group.inside
        pieces.append(_one(module, q, k, v, sliding_window, kwargs, inside).flatten(0, 1))
    return plan.back(torch.cat(pieces)).unflatten(0, (len(query), whole)), None


def _one(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    kwargs: dict[str, Any],
    inside: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of documents, within the sliding window where there is one; [n, s, heads, d].

    Args:
        inside: bool [n, s], what is no padding, where a document would see it.
    """
    mask = None if inside is None else inside[:, None, None, :]
    length = query.shape[2]
    if window is not None and length > window:
        at = torch.arange(length, device=query.device)
        distance = at[:, None] - at[None, :]
        near = (distance < window) & (distance >= 0 if is_causal(module, kwargs) else distance > -window)
        # What fills up sees something, or the softmax of nothing would be no number.
        mask = near[None, None] if inside is None else (inside[:, None, None, :] & near) | ~inside[:, None, :, None]
    if not dropped.fits(query, kwargs):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    if mask is None and length > 1 and is_causal(module, kwargs):
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    found = dropped.attention(query, key, value, mask, kwargs["dropout"], kwargs.get("scaling"))
    return found.transpose(1, 2)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
OWN_MASKS = {"doge", "phimoe"}
"""Models whose layers tell of what is seen by masks alone: Doge leaves keys out, Phi-3.5-MoE has a window."""


def implementation(config: PretrainedConfig, wanted: str) -> str:
    """The name to give to transformers for the recipe's `attn_implementation`.

    Models with layers of another kind (linear, chunked, ...) or of `OWN_MASKS` keep transformers' own masks. For
    `auto` it is what computes attention on every device; `ptrain.model.choice` knows what is faster on this one.
    """
    if wanted not in ("auto", "sdpa"):
        return wanted
    known = set(getattr(config, "layer_types", None) or KNOWN_LAYERS) <= KNOWN_LAYERS
    return NAME if known and config.model_type not in OWN_MASKS else "sdpa"


def refuse_packing(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError where documents of one row could see each other.

    Eager, sdpa, flex and flash attention of transformers separate documents by position ids; a layer that
    carries a state from token to token does not.
    """
    others = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if others or name not in (NAME, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"):
        what = f"layers of the kind {sorted(others)}" if others else f"the attention `{name}`"
        raise ModelError(
            f"packed documents would see each other through {what}",
            fix="set `data.pack_samples: false`",
        )
