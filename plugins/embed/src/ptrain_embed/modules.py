"""The format of sentence-transformers: what a folder says of pooling, projection, normalisation and prompts.

Written so that every version of it since 2.0 can read it: by the names and keys that newer ones still know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from ptrain import ModelError
from ptrain_embed.pooling import Pooling

if TYPE_CHECKING:
    import torch

MODULES, SETTINGS, BODY = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
WEIGHTS = "model.safetensors"
POOLING_KEYS = {
    "cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken",
}  # fmt: skip
"""By pooling, the key that says so in `1_Pooling/config.json`."""
OTHER_POOLING = {"lasttoken": "last"}
"""What newer versions call it in `pooling_mode`."""
IDENTITY = "torch.nn.modules.linear.Identity"
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""The names that the prompt of documents goes by, in the order in which they are looked for."""


@dataclass(frozen=True)
class Modules:
    """What follows the body of a model.

    Attributes:
        projection: the folder of a linear layer between pooling and normalisation, where there is one.
        dimension: that it projects to.
        max_length: the most tokens of a text, with special ones.
    """

    pooling: Pooling = "mean"
    normalize: bool = True
    projection: Path | None = None
    dimension: int | None = None
    query_prompt: str = ""
    document_prompt: str = ""
    max_length: int | None = None


def read(name: str, revision: str | None = None) -> Modules | None:
    """What a model of sentence-transformers says of itself; None where `name`, a folder or on the hub, is none.

    Raises:
        ModelError: it does something that can't be trained here.
    """
    path = _file(name, revision, MODULES)
    if path is None:
        return None
    entries = _json(path)
    kinds = [str(entry.get("type", "")).rpartition(".")[2] for entry in entries]
    known = [["Transformer", "Pooling", *dense, *norm] for dense in ([], ["Dense"]) for norm in ([], ["Normalize"])]
    if kinds not in known:
        raise ModelError(
            f"`{name}` is a model of sentence-transformers with the modules {', '.join(kinds)}",
            expected="Transformer and Pooling, then Dense and Normalize where there are some",
            fix="name the folder of its transformer, and set `model.pooling` and the like",
        )
    folders = {kind: str(entry.get("path", "")) for kind, entry in zip(kinds, entries, strict=True)}
    texts = _prompts(_json(_file(name, revision, SETTINGS)))
    found = Modules(
        pooling=_pooling(name, _json(_file(name, revision, f"{folders['Pooling']}/config.json"))),
        normalize="Normalize" in kinds, max_length=_json(_file(name, revision, BODY)).get("max_seq_length"),
        query_prompt=texts[0], document_prompt=texts[1],
    )  # fmt: skip
    return _with_projection(found, name, revision, folders["Dense"]) if "Dense" in kinds else found


def _with_projection(modules: Modules, name: str, revision: str | None, folder: str) -> Modules:
    import dataclasses

    weights = _file(name, revision, f"{folder}/{WEIGHTS}")
    config = _json(_file(name, revision, f"{folder}/config.json"))
    if weights is None or config.get("activation_function") != IDENTITY or config.get("bias", True):
        raise ModelError(
            f"`{name}` has a projection that can't be trained here (`{folder}`)",
            expected=f"a linear layer without bias (`activation_function: {IDENTITY}`), in `{WEIGHTS}`",
        )
    return dataclasses.replace(modules, projection=weights.parent, dimension=int(config["out_features"]))


def _pooling(name: str, config: Mapping[str, Any]) -> Pooling:
    given = config.get("pooling_mode") or [kind for kind, key in POOLING_KEYS.items() if config.get(key)]
    others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    kinds = [given] if isinstance(given, str) else list(given)
    kind = OTHER_POOLING.get(kinds[0], kinds[0]) if len(kinds) == 1 else ""
    if kind not in get_args(Pooling) or (others and others != [POOLING_KEYS[kind]]):
        said = ", ".join(map(str, others or kinds)) or "nothing that is known"
        raise ModelError(f"`{name}` pools by {said}", expected="one of " + ", ".join(get_args(Pooling)))
    if config.get("include_prompt", True) is False:
        raise ModelError(f"`{name}` leaves the tokens of the prompt out of the pooling, which can't be trained here")
    return cast(Pooling, kind)


def _prompts(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Those of queries and of documents: by their names, or else the one that the settings name for every text."""
    texts = settings.get("prompts") or {}
    default = texts.get(settings.get("default_prompt_name") or "") or ""
    query = texts.get("query", default)
    # Newer versions write an empty `document` beside the one that the model was trained with.
    document = next((text for one in DOCUMENT_PROMPTS if (text := texts.get(one))), default)
    return query or "", document


def _file(name: str, revision: str | None, path: str) -> Path | None:
    """A file of the model, from its folder or from the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / path if (folder / path).is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        name, path, revision=revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    return Path(found) if found else None


def _json(path: Path | None) -> Any:
    """What a file holds; nothing where there is none."""
    if path is None:
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"`{path}` is no JSON: {error}", fix="save or download the model again") from error


def write(folder: Path, modules: Modules, width: int, projection: torch.Tensor | None = None) -> None:
    """Add to a saved body and its tokenizer what sentence-transformers needs to make the same vectors.

    Args:
        width: of the body's hidden states.
        projection: its weight, [d, width].
    """
    entries = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _dump(folder / "1_Pooling/config.json", _pooling_keys(modules.pooling, width))
    if projection is not None:
        entries.append(("2_Dense", "Dense"))
        _write_projection(folder / "2_Dense", projection)
    if modules.normalize:
        entries.append((f"{len(entries)}_Normalize", "Normalize"))
    listed = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(entries)
    ]
    _dump(folder / MODULES, listed)
    _dump(folder / BODY, {"max_seq_length": modules.max_length, "do_lower_case": False})
    _dump(folder / SETTINGS, _settings(modules))


def _settings(modules: Modules) -> dict[str, Any]:
    import torch
    import transformers

    return {
        # Of the format, not of what is installed: a newer one than the reader's would make it warn.
        "__version__": {
            "sentence_transformers": "2.4.0", "transformers": transformers.__version__, "pytorch": torch.__version__,
        },
        "prompts": {"query": modules.query_prompt, "document": modules.document_prompt},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine" if modules.normalize else "dot",
    }  # fmt: skip


def _pooling_keys(pooling: Pooling, width: int) -> dict[str, Any]:
    keys = {key: kind == pooling for kind, key in POOLING_KEYS.items()}
    others = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
    return {"word_embedding_dimension": width, **keys, **dict.fromkeys(others, False), "include_prompt": True}


def _write_projection(folder: Path, weight: torch.Tensor) -> None:
    from safetensors.torch import save_file

    size, width = weight.shape
    keys = {"in_features": width, "out_features": size, "bias": False, "activation_function": IDENTITY}
    _dump(folder / "config.json", keys)
    save_file({"linear.weight": weight.contiguous()}, folder / WEIGHTS)


def load_projection(layer: torch.nn.Linear, folder: Path) -> None:
    """Give a projection the weight that was saved in `folder`.

    Raises:
        ModelError: it has another shape.
    """
    import torch
    from safetensors.torch import load_file

    weight = load_file(folder / WEIGHTS).get("linear.weight")
    if weight is None or weight.shape != layer.weight.shape:
        found = "has no `linear.weight`" if weight is None else f"is {list(weight.shape)}"
        raise ModelError(f"the projection in `{folder}` {found}", expected=str(list(layer.weight.shape)))
    with torch.no_grad():
        layer.weight.copy_(weight)


def _dump(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
