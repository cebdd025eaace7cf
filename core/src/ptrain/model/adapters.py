"""Adapters of the library peft (LoRA and its like), put into a model in place.

The model stays the class of transformers that it was and keeps its places: only some layers are adapted ones, so that
stages, trainers and kernels need to know nothing of it. What peft makes round the model is kept beside it, not in it:
it saves, merges and switches off.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from ptrain.run import Run

log = logging.getLogger("ptrain")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEPT = "ptrain_adapter"
"""The attribute of a model in which what peft makes round it is kept."""
SCHEDULED = "ADALORA"
"""Changes its ranks while it is trained, by calls of its own between the steps."""
SET_HERE = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping")
"""Keys of peft that say what the recipe says elsewhere, or what training decides."""
IMPORTING = ("megatron_config", "megatron_core")
"""Keys that name a module, which peft would import: a recipe and an adapter are data."""
OTHER_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "lora_r": "r"}
"""What other tools call keys of LoRA."""


def peft_config(keys: Mapping[str, Any]) -> PeftConfig:
    """The configuration that `model.peft_config` describes; its `peft_type` is LORA where it is not given.

    Raises:
        ModelError: there is no such method or key, or it can't be trained here.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds: Mapping[str, Any] = {str(kind.value): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    given = {"task_type": "CAUSAL_LM", **keys}
    kind = str(given.pop("peft_type", "LORA")).upper()
    if kind not in kinds:
        raise ModelError(f"`model.peft_config.peft_type` is `{kind}`", expected="one of " + ", ".join(sorted(kinds)))
    if kind == SCHEDULED:
        raise ModelError(
            f"`model.peft_config.peft_type: {kind}` needs calls of its own between the steps, which nothing makes here",
            fix="use `LORA`",
        )
    _check_keys(kind, kinds[kind], given)
    try:
        made = kinds[kind](**given)
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"`model.peft_config` is no configuration of {kind}: {error}") from error
    if made.is_prompt_learning:
        raise ModelError(
            f"`model.peft_config.peft_type: {kind}` puts tokens before the prompt, which masks and packing can't know",
            fix="use a method that adapts weights, such as `LORA`",
        )
    return made


def _check_keys(kind: str, made: Any, given: Mapping[str, Any]) -> None:
    from dataclasses import fields

    from ptrain.recipe.suggest import closest

    known = sorted({field.name for field in fields(made)} - {*SET_HERE, *IMPORTING, "peft_type"})
    for key in given:
        if key not in known:
            guess = OTHER_NAMES.get(key) if OTHER_NAMES.get(key) in known else closest(key, known)
            raise ModelError(
                f"{kind} has no key `{key}` (in `model.peft_config`)", expected="some of " + ", ".join(known),
                fix=f"write `{guess}`" if guess else None,
            )  # fmt: skip


def attach(model: PreTrainedModel, keys: Mapping[str, Any], base: str, revision: str | None) -> None:
    """Add a new adapter to `model`; from then on only the adapter is trained.

    Args:
        keys: `model.peft_config`.
        base: the name or folder of the model, which the saved adapter names as what it belongs to.
        revision: of that.

    Raises:
        ModelError: the method is not known, finds nothing to adapt, or changes the weights of the model itself.
    """
    from peft import get_peft_model

    kind = "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION"
    config = peft_config({"task_type": kind, **keys})
    before = _state(model)
    blank = model.device.type == "meta"
    try:
        with _told():
            made: Any = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=blank)
    except (ValueError, TypeError, NotImplementedError, ImportError, AssertionError) as error:
        raise ModelError(
            f"`model.peft_config` can't be applied to a model of the type {model.config.model_type}: {error}"
        ) from error
    changed = [name for name, state in _state(model).items() if name in before and before[name] != state]
    if changed and not blank:
        raise ModelError(
            f"`model.peft_config` changes the model's own weights (`{changed[0]}`), and the adapter alone is saved",
            fix="leave out `init_lora_weights`, or choose one that begins with the model as it is",
        )
    # peft writes down the name that the model was loaded with: a path from here, or a link such as `latest`.
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.revision = revision
    _keep(model, made)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Within it, what peft warns of is told as ptrain tells it; how it calls transformers is not the user's matter."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(one.message) for one in found if one.category is not FutureWarning):
        log.warning(message)


def _state(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """By name, what tells whether a weight of the model itself has been written to, or another put in its place.

    A layer that is adapted has moved one level down.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", "."): (p.data_ptr(), p._version) for name, p in named}


def load(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter in `folder` into `model`, which it belongs to, to be trained further.

    Raises:
        ModelError: its weights are not there as safetensors, or don't fit.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"the adapter `{folder}` has no `{WEIGHTS}`", expected="an adapter saved as safetensors")
    if _content(folder).get(IMPORTING[0]):
        raise ModelError(f"the adapter `{folder}` was made with Megatron (`{IMPORTING[0]}`), which is not used here")
    try:
        with _told():
            if model.device.type == "meta":
                config = PeftConfig.from_pretrained(str(folder))
                config.inference_mode = False
                made: Any = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
            else:
                made = PeftModel.from_pretrained(model, str(folder), is_trainable=True, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter `{folder}` does not fit its model: {error}") from error
    _keep(model, made)


def _keep(model: PreTrainedModel, made: PeftModel) -> None:
    inside = {id(p) for p in model.parameters()}
    outside = [name for name, p in made.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise ModelError(
            f"`model.peft_config` trains `{outside[0]}`, which is not within the model",
            fix="use a method such as `LORA`",
        )
    # Not as an attribute of the module: it would become a part of the model that it holds.
    model.__dict__[KEPT] = made


def adapter_of(model: PreTrainedModel) -> PeftModel | None:
    """What peft has made round `model`, if it has an adapter."""
    return model.__dict__.get(KEPT)


@contextlib.contextmanager
def switched_off(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `model` computes what it would without its adapter."""
    adapter = adapter_of(model)
    if adapter is None:
        raise ModelError("the model has no adapter to switch off", fix="give it one with `model.peft_config`")
    with adapter.disable_adapter():
        yield


def folder_of(name: str, revision: str | None = None) -> Path | None:
    """The folder of the adapter that `name` is, downloaded where it is one of the hub; None where it is a model.

    Raises:
        ModelError: a folder holds both.
    """
    if not name:
        return None
    if Path(name).is_dir():
        found = Path(name) / CONFIG if (Path(name) / CONFIG).is_file() else None
        if found is not None and (Path(name) / "config.json").is_file():
            raise ModelError(
                f"`{name}` holds both a model and an adapter",
                fix=f"move `{CONFIG}` and `{WEIGHTS}` to a folder of their own",
            )
        return found.parent if found is not None else None
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name, revision=revision) is None:
        return None
    path = cached_file(name, WEIGHTS, revision=revision)
    return Path(str(path)).parent


def base_of(folder: Path) -> tuple[str, str | None]:
    """The name or folder, and the revision, of the model that the adapter in `folder` belongs to.

    Raises:
        ModelError: it does not say.
    """
    content = _content(folder)
    if not content.get("base_model_name_or_path"):
        raise ModelError(
            f"`{folder / CONFIG}` does not say which model the adapter belongs to", expected="`base_model_name_or_path`"
        )
    return content["base_model_name_or_path"], content.get("revision")


def _content(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"`{folder / CONFIG}` can't be read: {error}") from error
    return found if isinstance(found, dict) else {}


def save(model: PreTrainedModel, path: Path, weights: Mapping[str, Any]) -> None:
    """Write the adapter of `model` to the folder `path`, as peft loads it.

    Args:
        weights: by the model's own names, those that are trained and the buffers.
    """
    adapter: Any = adapter_of(model)
    prefix = "base_model.model."
    renamed = {f"{prefix}{name}": value for name, value in weights.items()}
    # What layers share (of VeRA, say) is beside the model.
    renamed.update({name: value for name, value in adapter.state_dict().items() if not name.startswith(prefix)})
    # Embeddings are saved where they are trained; the number of tokens never changes here.
    adapter.save_pretrained(str(path), state_dict=renamed, save_embedding_layers=False)


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Give the adapter of `model` the weights of the one that was saved in `folder`."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(adapter_of(model), load_file(folder / WEIGHTS))


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with its adapter in its weights, in place; it has no adapter then.

    Raises:
        ModelError: the method can't be merged.
    """
    adapter: Any = adapter_of(model)
    try:
        with _told():
            found = adapter.merge_and_unload()
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise ModelError(f"an adapter of this kind can't be merged: {error}") from error
    del model.__dict__[KEPT]
    return found


def check_tokens(run: Run, model: PreTrainedModel) -> None:
    """Raise ModelError where the tokenizer has tokens new to the model, and their embeddings stay as they are.

    Args:
        model: with its adapter, on any device.
    """
    adapter = adapter_of(model)
    own = None if adapter is None else _own_tokenizer(run)
    if adapter is None or own is None:
        return
    new = sorted(at for _, at in {*run.tokenizer.get_vocab().items()} - {*own.get_vocab().items()})
    indices: Any = getattr(adapter.peft_config["default"], "trainable_token_indices", None) or []
    rows = {row for group in (indices.values() if isinstance(indices, Mapping) else [indices]) for row in group}
    embeddings: Any = model.get_input_embeddings()
    trained = set(new) <= rows if rows else any(p.requires_grad for p in embeddings.parameters())
    if new and not trained:
        raise ModelError(
            f"the tokenizer has {len(new)} tokens that the model was not trained with, such as "
            f"`{run.tokenizer.convert_ids_to_tokens(new[0])}`, and the adapter leaves their embeddings as they are",
            fix=f"add `trainable_token_indices: {new[:8]}` to `model.peft_config`"
            if len(new) <= 8 else "add `modules_to_save: [embed_tokens, lm_head]` to `model.peft_config`",
        )  # fmt: skip


def _own_tokenizer(run: Run) -> Any:
    """The tokenizer that comes with the model, or None where there is none beside the recipe's."""
    from transformers import AutoTokenizer

    name, revision = run.recipe.model.name_or_path, getattr(run.recipe.model, "revision", None)
    own = run.recipe.tokenizer.name_or_path in ("", name) and run.recipe.tokenizer.type != "train"
    if not name or own:
        return None
    folder = folder_of(name, revision)
    name, revision = base_of(folder) if folder is not None else (name, revision)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return None
