"""Whether a speculator fits its base, its tokenizer and the memory, asked before anything is built."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ptrain
from ptrain import ModelError
from ptrain_spec_decode.saved import CONFIG, WEIGHTS, read, vocabulary_digest

if TYPE_CHECKING:
    from ptrain import Run
    from ptrain_spec_decode.layout import Shape
    from ptrain_spec_decode.saved import Base

GIB = 2**30
MEMORY = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says how much memory a container may use."""


def check_tokenizer(run: Run) -> None:
    """Raise RecipeError where the recipe's tokenizer gives other ids than the base's own.

    A speculator is for the ids that the base reads and writes.
    """
    own = _own_tokenizer(run)
    if own is None or vocabulary_digest(own) == vocabulary_digest(run.tokenizer):
        return
    tokenizer, base = run.recipe.tokenizer, run.recipe.model.name_or_path
    name = f"`{tokenizer.name_or_path}`" if tokenizer.name_or_path else f"of the type `{tokenizer.type}`"
    where = run.loaded.document.value_position(("tokenizer", "name_or_path" if tokenizer.name_or_path else "type"))
    raise ptrain.RecipeError(
        f"the tokenizer {name} is not that of the base: it has {len(run.tokenizer)} tokens, that of `{base}` has "
        f"{len(own)}, and they do not have the same ids",
        where=where, expected="the tokenizer of the base, whose tokens are drafted", fix="leave `tokenizer` out",
    )  # fmt: skip


def _own_tokenizer(run: Run) -> Any:
    """The tokenizer that lies beside the base, where the recipe takes another one; else None."""
    from transformers import AutoTokenizer

    name, chosen = run.recipe.model.name_or_path, run.recipe.tokenizer
    same = chosen.name_or_path in ("", name) and chosen.type != "train"
    if not name or same or not hasattr(run.tokenizer, "get_vocab"):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, revision=getattr(run.recipe.model, "revision", None))
    except (OSError, ValueError):  # the base has none
        return None


def saved_shape(run: Run, folder: Path, wanted: Shape, base: Base, given: Mapping[str, str]) -> Shape:
    """The shape of the speculator in `folder`, which has to fit the base and what the recipe says.

    Args:
        wanted: by the keys of the recipe.
        base: that of the run.
        given: keys that the recipe gives, with what a shape calls them.

    Raises:
        RecipeError: it is for another base, or other than the recipe says.
    """
    found, made_for = read(folder)
    where = run.loaded.document.value_position(("speculator_path",))
    for what, theirs, ours in (
        ("whose hidden states have the width", found.hidden_size, wanted.hidden_size),
        ("whose vocabulary has the size", found.vocab_size, wanted.vocab_size),
        ("of the class", *_names(made_for.architectures, base.architectures)),
        ("with a tokenizer of the digest", *_both(made_for.tokenizer, base.tokenizer)),
    ):
        if theirs != ours:
            raise ptrain.RecipeError(
                f"the speculator in `{folder}` is made for another base (`{made_for.name}`), {what} {theirs}",
                where=where, expected=f"{ours}, as of `{run.recipe.model.name_or_path}`",
            )  # fmt: skip
    for key, name in given.items():
        if (theirs := getattr(found, name)) != (ours := getattr(wanted, name)):
            raise ptrain.RecipeError(
                f"`model.{key}` says {_said(ours)}, and the speculator in `{folder}` has {_said(theirs)}",
                where=run.loaded.document.value_position(("model", key)), fix=f"leave `{key}` out",
            )  # fmt: skip
    if made_for.name and base.name and made_for.name != base.name:
        run.warn(f"the speculator in `{folder}` was made for `{made_for.name}`, and this base is `{base.name}`")
    return found


def _both(one: Any, other: Any) -> tuple[Any, Any]:
    return (one, other) if one is not None and other is not None else (None, None)


def _names(one: tuple[str, ...] | None, other: tuple[str, ...] | None) -> tuple[Any, Any]:
    first, second = _both(one, other)
    return (", ".join(first), ", ".join(second)) if first is not None else (None, None)


def _said(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def check_size(run: Run, shape: Shape) -> None:
    """Raise ModelError where the speculator alone needs more memory than a worker, or the machine, can have.

    Every worker builds the whole of it in the memory of the machine; then its weights and gradients are on the device,
    with its share of the optimizer's fp32 numbers. What the base needs comes on top.
    """
    device = getattr(run, "device", None)
    if device is not None and device.type == "meta":  # a plan, for another machine
        return
    weight = 4 if run.recipe.model.dtype == "fp32" else 2
    need, there, what = shape.parameters * weight, memory_here(), "the memory of this machine"
    if device is not None:
        kept = int(shape.parameters * _kept(run, weight, gpu=device.type == "cuda"))
        if device.type == "cuda":
            import torch

            there, what = torch.cuda.get_device_properties(device).total_memory, "the memory of the GPU"
            need = kept
        else:
            need = max(need, kept)
    if need > there:
        width = ".".join(map(str, shape.inner))
        raise ModelError(
            f"{shape.n_predict} heads of the width {width} make a speculator of {shape.parameters:,} parameters, which "
            f"takes at least {need / GIB:,.1f} GiB",
            expected=f"less than {there / GIB:,.1f} GiB, {what}",
            fix="take a smaller `speculator_width`, fewer `n_speculator_heads`, or `speculator_tie_weights: true`",
        )


def _kept(run: Run, weight: int, *, gpu: bool) -> float:
    """Bytes that a worker keeps at least of each parameter, with its gradient and the optimizer's fp32 numbers: all of
    what ZeRO does not shard, and on a GPU none of what is offloaded to the machine."""
    zero = run.zero

    def share(size: int, stage: int, offload: str) -> float:
        if gpu and (zero.get(offload) or {}).get("device", "none") != "none":
            return 0
        return size / run.world if zero["stage"] >= stage else size

    optimizer = "offload_optimizer"
    return share(weight, 3, "offload_param") + share(weight, 2, optimizer) + share(16 - 2 * weight, 1, optimizer)


def memory_here() -> int:
    """The bytes of memory that processes of this machine, or of this container, may use."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(whole, int(MEMORY.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no such file, or "max"
        return whole


def content(folder: Path) -> str:
    """A digest of the files of a saved speculator."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
    return digest.hexdigest()
