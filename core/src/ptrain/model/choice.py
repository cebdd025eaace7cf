"""Which attention a run computes with where the recipe leaves it open (`attn_implementation: auto`), and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ptrain.data.collate import collate
from ptrain.model.attention import NAME, implementation, per_document
from ptrain.model.varlen import DTYPES, LARGEST_HEAD, VARLEN, document_arguments

if TYPE_CHECKING:
    from transformers import PretrainedConfig


FAR = 0.05
"""Of the largest value: how far two kernels may lie apart in 16 bit; documents that see each other lie much further."""


@dataclass(frozen=True)
class Choice:
    """The name that transformers is given, and why."""

    name: str
    because: str


@dataclass(frozen=True)
class Place:
    """What the choice depends on.

    Attributes:
        device: its type, such as "cuda".
        capability: of an NVIDIA GPU: (8, 0) is Ampere.
        dtype: of the weights.
        head: the size of the model's largest head.
        flash: transformers' names for what is installed of flash attention and fits model and GPU, the newest first.
        varlen: whether torch itself has a kernel for documents of any length.
    """

    device: str
    capability: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.bfloat16
    head: int = 128
    flash: Sequence[str] = ()
    varlen: bool = False

    def without(self, name: str) -> Place:
        """The same place, had it not this kernel."""
        flash = tuple(one for one in self.flash if one != name)
        return replace(self, flash=flash, varlen=self.varlen and name != VARLEN)


def choose(plain: str, place: Place) -> Choice:
    """A kernel for all documents at once, where there is one that is exact here; otherwise what works everywhere.

    Args:
        plain: what computes it everywhere: `ptrain_sdpa`, or transformers' `sdpa` where a model needs its masks.
    """
    if plain != NAME:
        return Choice(plain, "the model has layers with masks of their own")
    if place.device != "cuda":
        return Choice(plain, f"the device is {place.device}")
    if place.dtype not in DTYPES:
        return Choice(plain, "flash attention computes in bf16 and fp16 alone")
    if place.capability < (8, 0):
        return Choice(plain, "the GPU is older than flash attention (Ampere)")
    if place.head > LARGEST_HEAD:
        return Choice(plain, f"the model's heads have {place.head} numbers, and flash attention takes {LARGEST_HEAD}")
    if place.flash:
        return Choice(place.flash[0], "it is installed")
    if place.varlen:
        return Choice(VARLEN, "no flash-attn that fits is installed, and torch has a kernel for packed documents")
    return Choice(plain, "neither flash-attn nor a torch with a kernel for packed documents is installed")


def attention(
    config: PretrainedConfig, wanted: str, dtype: torch.dtype, device: torch.device, kind: type[Any] | None = None
) -> Choice:
    """The attention of a run: what the recipe says, or what is chosen for `auto` and works here.

    Args:
        kind: the class of the model, where it is one of transformers' own.
    """
    plain = implementation(config, wanted)
    if wanted != "auto":
        return Choice(plain, f"the recipe says `{wanted}`")
    if kind is not None and not kind._supports_attention_backend:
        return Choice("eager", f"{kind.__name__} computes attention in its own way")
    place, failed = _place(config, kind, dtype, device), ""
    while (choice := choose(plain, place)).name != plain:
        reason = failure(choice.name, place.head, dtype, device)
        if reason is None:
            break
        failed += f"; {choice.name} does not work here: {reason}"
        place = place.without(choice.name)
    return replace(choice, because=choice.because + failed)


def failure(name: str, head: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this attention can't be used, or None: a layer with heads of this size tries it on packed documents.

    Kernels are compiled for some GPUs, drivers and sizes alone, and say so when they are called.
    """
    try:
        found, expected = (_tried(one, head, dtype, device) for one in (name, NAME))
    except Exception as error:  # whatever a kernel raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    return None if difference <= FAR else f"its result is off by {difference:.1%}"


def _tried(name: str, head: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer makes of two rows of packed documents, and the gradient of its input, both in fp32."""
    from transformers import AutoConfig, AutoModel

    ids = torch.arange(24)
    rows = [{"input_ids": ids, "labels": ids, "document_lengths": lengths} for lengths in ([17, 7], [5, 19])]
    batch = collate(rows, pad_id=0)
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    config = AutoConfig.for_model(
        "llama", vocab_size=len(ids), hidden_size=2 * head, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation=name, dtype=dtype).to(device)
        inputs = model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
        documents = document_arguments(model, batch)
        with per_document():
            out = model(inputs_embeds=inputs, position_ids=batch["position_ids"], use_cache=False, **documents)[0]
        (gradient,) = torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out))
    return out.detach().float(), gradient.float()


def _place(config: PretrainedConfig, kind: type[Any] | None, dtype: torch.dtype, device: torch.device) -> Place:
    if device.type != "cuda":
        return Place(device.type)
    capability = torch.cuda.get_device_capability(device)
    return Place(device.type, capability, dtype, largest_head(config), _flash(kind, capability), has_varlen())


def largest_head(config: PretrainedConfig) -> int:
    """The size of the largest head of a model: some have several, by kind of attention or by layer."""
    text = config.get_text_config()
    return max(_head_sizes(text.to_dict()), default=0) or text.hidden_size // text.num_attention_heads


def _head_sizes(keys: Mapping[Any, Any]) -> Iterator[int]:
    for key, value in keys.items():
        if isinstance(value, Mapping):
            yield from _head_sizes(value)
        elif str(key).endswith("head_dim") and isinstance(value, int):
            yield value


def _flash(kind: type[Any] | None, capability: tuple[int, int]) -> list[str]:
    """Flash attention 3 is for Hopper; a model says itself whether it can do with flash attention."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    if kind is None or not (kind._supports_flash_attn and kind._supports_attention_backend):
        return []
    hopper = capability[0] == 9 and is_flash_attn_3_available()
    return ["flash_attention_3"] * hopper + ["flash_attention_2"] * is_flash_attn_2_available()


def has_varlen() -> bool:
    """Whether torch's `varlen_attn` is there, with windows and grouped heads (torch 2.10 had neither)."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    needed = {"scale", "window_size", "enable_gqa"}
    return torch.version.hip is None and needed <= set(inspect.signature(varlen_attn).parameters)
