"""Load an export as a stranger would and write its logits: `python -m ptrain.checkpoint.reload FOLDER ASKED OUT`."""

from __future__ import annotations

import contextlib
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain import garbage

if TYPE_CHECKING:
    import torch


def main(folder: str, asked: str, out: str) -> None:
    """Write the logits [tokens, v], or the hidden states of a model without an output layer, as safetensors, to `out`.

    Args:
        folder: the export.
        asked: a JSON file with `ids`, the token ids, `trust_remote_code`, and `conversation`: messages of which the
            tokenizer makes a prompt (its ids are written as `prompt`), or null; `dtype` and `rounded`, as the
            recipe has them (`model.dtype`, `model.quantization_config`); `auto`, the class of transformers that loads
            it; `module`, which tells transformers of the model's class where it is a plugin's.
    """
    garbage.look_seldom()
    import torch
    from jinja2 import TemplateError
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    question = json.loads(Path(asked).read_text(encoding="utf-8"))
    trusted = question["trust_remote_code"]
    if question["module"]:
        import_module(question["module"])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    adapted = Path(folder, "adapter_config.json").is_file()
    import_module("transformers.modeling_utils")  # the last of what is large
    garbage.look_as_usual()
    model = _adapted(folder, trusted, question) if adapted else _model(folder, trusted, question["auto"])
    with torch.no_grad():
        found = {"logits": answer(model.eval(), torch.tensor([question["ids"]])).contiguous()}
    if question["conversation"]:
        # A template may want a system prompt or tools: then there is nothing to compare.
        with contextlib.suppress(TemplateError, TypeError, ValueError, KeyError):
            made = tokenizer.apply_chat_template(question["conversation"], add_generation_prompt=True, return_dict=True)
            found["prompt"] = torch.tensor(made["input_ids"])
    save_file(found, out)


def answer(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What `model` makes of ids [1, tokens]: logits [tokens, v], or hidden states where it has no output layer."""
    out = model(input_ids=ids, **({"use_cache": False} if model.can_generate() else {}))
    logits = getattr(out, "logits", None)
    return (out.last_hidden_state if logits is None else logits)[0]


def _model(folder: str, trusted: bool, auto: str) -> Any:
    import transformers

    loaded: Any = getattr(transformers, auto).from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=trusted, output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        # transformers would fill them with random numbers.
        raise SystemExit(f"weights are missing: {sorted(map(str, report['missing_keys']))[:3]}")
    return model


def _adapted(folder: str, trusted: bool, question: dict[str, Any]) -> Any:
    """The model that an adapter belongs to, as it was when it was trained, and the adapter in it."""
    import transformers
    from peft import PeftConfig, PeftModel

    from ptrain.model.quantized import DTYPES, keep_gradients, rounding

    rounded = question["rounded"]
    more = {"quantization_config": rounding(rounded, question["dtype"])} if rounded else {}

    config: Any = PeftConfig.from_pretrained(folder)
    base: Any = getattr(transformers, question["auto"]).from_pretrained(
        config.base_model_name_or_path, revision=config.revision, dtype=DTYPES[question["dtype"]],
        use_safetensors=True, trust_remote_code=trusted, **more,
    )  # fmt: skip
    keep_gradients(base)  # as in training: packed weights are multiplied in bf16
    return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
