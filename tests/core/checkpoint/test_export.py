"""The export: what `AutoModelForCausalLM` loads is what was trained, and a bad export is never put into place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RECIPE = {
    "type": "tiny",
    "data": {"sources": [{"type": "jsonl", "path": "unused.jsonl"}]},
    "optimizer": {"lr": 1e-2},
    "checkpoint": [{"type": "huggingface"}],
}
"""Without a model."""
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
}  # fmt: skip
"""ZeRO-3 as it is for large models: no weight is whole outside of the moment in which it is used."""


def recipe(model: str, dtype: str, stage: int, **checkpoint: Any) -> dict[str, Any]:
    """A recipe that exports."""
    return {
        **RECIPE,
        "model": {"name_or_path": model, "dtype": dtype},
        "tokenizer": {"chat_template": "chatml"},
        "checkpoint": [{"type": "huggingface", **checkpoint}],
        "deepspeed": {"zero_optimization": {"stage": stage, **(NOTHING_STAYS if stage == 3 else {})}},
    }


@pytest.fixture(scope="module")
def results(
    models: dict[str, str], workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What happened to every case, by name; two workers, and one."""
    tied, untied = models["tied"], models["untied"]
    two = {
        "tied": {"recipe": recipe(tied, "bf16", 3)},
        "untied": {"recipe": recipe(untied, "fp32", 3, max_shard_size="100KB")},
        "not gathered": {"recipe": recipe(tied, "fp32", 3, verify=False), "damage": "not gathered", "whole": False},
    }
    one = {
        "not finite": {"recipe": recipe(tied, "bf16", 2, verify=False), "damage": "not finite"},
        "altered": {"recipe": recipe(tied, "fp32", 0), "damage": "altered"},
        "missing": {"recipe": recipe(tied, "fp32", 0), "damage": "missing"},
        "template": {"recipe": recipe(tied, "fp32", 0), "damage": "template"},
    }
    found: dict[str, Any] = {}
    for count, cases in ((2, two), (1, one)):
        folder = tmp_path_factory.mktemp(f"workers-{count}")
        listed = [{"do": "export", **case} for case in cases.values()]
        for number, (name, result) in enumerate(zip(cases, workers(listed, count, folder), strict=True)):
            found[name] = {**result, "dir": folder / str(number), "log": (folder / "worker-0.log").read_text()}
    return found


@pytest.mark.parametrize(("kind", "dtype"), [("tied", "bfloat16"), ("untied", "float32")])
def test_an_export_under_zero_3_is_the_model_in_training(
    kind: str, dtype: str, results: dict[str, Any], models: dict[str, str]
) -> None:
    """Two workers; the logits are equal, tied weights are there once, and nothing of ptrain's is in the settings."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = results[kind]
    assert "error" not in result, result
    folder = Path(result["path"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([result["ids"]])).logits[0]
    expected = load_file(result["dir"] / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, atol=1e-6 if dtype == "float32" else 0.02, rtol=0)
    before = AutoModelForCausalLM.from_pretrained(models[kind], dtype="auto").lm_head.weight
    assert (model.lm_head.weight.float() - before).abs().max() > 1e-3, "nothing was trained"

    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 if kind == "untied" else [file.name for file in files] == ["model.safetensors"]
    names = [name for file in files for name in load_file(file)]
    assert len(names) == len(set(names)) and ("lm_head.weight" in names) == (kind == "untied")
    assert all(value.dtype == getattr(torch, dtype) for file in files for value in load_file(file).values())
    config = json.loads((folder / "config.json").read_text())
    assert "ptrain" not in (folder / "config.json").read_text()
    assert config["use_cache"] is True and config["dtype"] == dtype
    assert config["tie_word_embeddings"] == (kind == "tied")
    tokenizer, old = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(models[kind])
    assert tokenizer.get_vocab() == old.get_vocab() and "<|im_start|>" in tokenizer.chat_template
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card and "trainer `tiny`" in card and "2 optimizer steps" in card


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_generation_stops_at_the_end_of_a_turn(kind: str, results: dict[str, Any]) -> None:
    """Also where the base model's settings are such that transformers refuses to save them."""
    from transformers import GenerationConfig

    made = GenerationConfig.from_pretrained(results[kind]["path"])
    assert made.eos_token_id == [0, 2] and made.pad_token_id == 0
    assert made.temperature is None or made.do_sample


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not gathered", "is empty"),
        ("not finite", r"`model.embed_tokens.weight` holds values that are not finite"),
        ("altered", r"gives other logits than the model in training"),
        ("missing", r"does not load again: weights are missing: .*down_proj"),
    ],
)
def test_a_bad_export_is_refused(name: str, message: str, results: dict[str, Any]) -> None:
    """Nothing is put into place."""
    import re

    result = results[name]
    assert re.search(message, result.get("error", "")), result
    assert not (result["dir"] / "model" / "latest").exists()


def test_another_way_to_ask_is_said(results: dict[str, Any]) -> None:
    """With both texts: the weights are right, but whoever loads the export would ask otherwise."""
    assert "error" not in results["template"]
    said = "the exported tokenizer does not write prompts as they were in training: "
    assert said in results["template"]["log"] and "n o w ?' instead of '" in results["template"]["log"]
    assert results["template"]["log"].count(said) == 1, "an export as it should be is not complained about"
    assert said not in results["tied"]["log"]
