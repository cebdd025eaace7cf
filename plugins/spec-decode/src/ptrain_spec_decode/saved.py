"""Folders of saved speculators: `model.safetensors` and a `config.json` that serving engines read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain import ModelError
from ptrain_spec_decode.layout import Shape, file_name, widths

if TYPE_CHECKING:
    import torch

    from ptrain_spec_decode.speculator import Speculator

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "mlp_speculator"
"""What vLLM knows every speculator of this family by."""
ARCHITECTURES = {
    ("mlp", "vllm"): "MLPSpeculatorPreTrainedModel",
    ("mlp", "arctic"): "ArcticMLPSpeculatorPreTrainedModel",
    ("lstm", "arctic"): "ArcticLSTMSpeculatorPreTrainedModel",
}
"""What the architecture of a kind is called by an engine."""


@dataclass(frozen=True)
class Base:
    """What a speculator is made for, as its configuration says; None of what it does not say.

    Attributes:
        name: of the base, or its folder.
        architectures: classes of transformers.
        tokenizer: the digest of its vocabulary.
    """

    name: str | None = None
    architectures: tuple[str, ...] | None = None
    tokenizer: str | None = None


def vocabulary_digest(tokenizer: Any) -> str:
    """A digest that is another for every other mapping of tokens to ids."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]


def config_of(shape: Shape, base: Base, dtype: str, engine: str) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        dtype: as torch calls it.
        engine: "vllm" or "arctic".
    """
    common = {
        "architectures": [ARCHITECTURES[shape.kind, engine]],
        "model_type": MODEL_TYPE,
        "base_model_name_or_path": base.name,
        "base_model_archs": list(base.architectures or ()),
        "base_model_tokenizer": base.tokenizer,
        "vocab_size": shape.vocab_size,
        "n_predict": shape.n_predict,
        "n_candidates": shape.n_predict,
        "top_k_tokens_per_head": [1] * shape.n_predict,
        "tie_weights": shape.tie_weights,
        "scale_input": shape.scale_input,
        "torch_dtype": dtype,
    }
    if shape.kind == "mlp":
        return {**common, "emb_dim": shape.hidden_size, "inner_dim": shape.inner[0]}
    stacked = {"inner_dim": shape.inner, "proj_dim": shape.proj, "emb_dim": shape.emb}
    dotted = {name: ".".join(map(str, sizes)) for name, sizes in stacked.items()}
    lstm = {"input_hidden_dim": shape.hidden_size, "method": shape.method, "tie_lstm_embs": shape.tie_lstm_embs}
    return {**common, **dotted, **lstm}


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that the content of a `config.json` describes.

    Raises:
        KeyError, ValueError, TypeError: it describes none.
    """
    common = {
        "vocab_size": int(config["vocab_size"]), "n_predict": int(config["n_predict"]),
        "tie_weights": bool(config.get("tie_weights")), "scale_input": bool(config.get("scale_input")),
    }  # fmt: skip
    if "input_hidden_dim" in config:
        return Shape(
            kind="lstm", hidden_size=int(config["input_hidden_dim"]), inner=widths(config["inner_dim"]),
            proj=widths(config["proj_dim"]), emb=widths(config["emb_dim"]), method=config.get("method", "sum_rnn"),
            tie_lstm_embs=bool(config.get("tie_lstm_embs")), **common,
        )  # fmt: skip
    # In a configuration of vLLM, 0 stands for the width of the base.
    width = (int(config.get("inner_dim") or config["emb_dim"]),)
    return Shape(kind="mlp", hidden_size=int(config["emb_dim"]), inner=width, proj=width, emb=width, **common)


def read(folder: Path) -> tuple[Shape, Base]:
    """The shape of the speculator in `folder`, and what it is made for.

    Raises:
        ModelError: there is none.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("model_type") != MODEL_TYPE:
            raise ValueError(f"its `model_type` is `{config.get('model_type')}`")
        found = shape_of(config)
    except FileNotFoundError:
        raise ModelError(f"`{folder}` holds no speculator: there is no `{CONFIG}`", expected=_EXPECTED) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"it has no `{error.args[0]}`" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"`{path}` describes no speculator: {said}", expected=_EXPECTED) from error
    architectures = config.get("base_model_archs")
    return found, Base(
        config.get("base_model_name_or_path"), tuple(architectures) if architectures else None,
        config.get("base_model_tokenizer"),
    )  # fmt: skip


_EXPECTED = "a folder that the checkpoint part `speculator` wrote, or one like it (`model_type: mlp_speculator`)"


def write(folder: Path, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Fill `folder`; `weights` are by the names of the file."""
    from safetensors.torch import save_file

    save_file(dict(weights), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_into(speculator: Speculator, folder: Path) -> None:
    """Give `speculator` the weights that are saved in `folder`.

    Raises:
        ModelError: they are not there, or are others than its shape says.
    """
    import torch

    weights = _weights(folder)
    check_names(folder, {name: tuple(value.shape) for name, value in weights.items()}, speculator.shape)
    with torch.no_grad():
        for name, parameter in speculator.named_parameters():
            parameter.copy_(weights[file_name(name)])


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ModelError(f"`{folder}` has no `{WEIGHTS}`", expected="weights saved as safetensors") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"`{folder / WEIGHTS}` can't be read: {error}") from error
    # Published ones may be saved as a part of a larger module.
    return {name.removeprefix("speculator."): value for name, value in found.items()}


def check_names(folder: Path, found: Mapping[str, tuple[int, ...]], shape: Shape) -> None:
    """Raise ModelError for the first tensor that is missing, not expected, or of another shape."""
    wanted = shape.tensors()
    for name in sorted({*wanted, *found}):
        if name not in found or name not in wanted:
            what = "lacks" if name in wanted else "has, and its configuration knows nothing of,"
            raise ModelError(f"`{folder / WEIGHTS}` {what} the tensor `{name}`")
        if found[name] != wanted[name]:
            raise ModelError(
                f"the tensor `{name}` of `{folder / WEIGHTS}` is {list(found[name])}",
                expected=f"{list(wanted[name])}, as `{CONFIG}` says",
            )
