"""`swiftkv` on real questions, by the real command: a teacher is trained, distilled, and its student trained further."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import run

DATA = Path(__file__).parents[4] / "shared" / "data" / "sft" / "gsm8k_train.messages.jsonl.gz"
pytestmark = pytest.mark.skipif(not DATA.is_file(), reason=f"the data set {DATA.name} is not here")
STEPS = 30


def recipe(folder: Path, kind: str, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """On the same questions, packed."""
    return {
        "type": kind, "output_dir": str(folder / kind), "model": {**model, "dtype": "fp32"},
        "data": {
            "sources": [{"type": "jsonl", "path": str(DATA), "sample_count": 600}], "train_eval_split": [0.9, 0.1],
            "max_length": 256, "overlength": "drop", "pack_samples": True, "cache_dir": str(folder / "cache"),
        },
        "micro_batch_size": 8, "optimizer": {"lr": 5e-3}, "train_iters": STEPS, "loss_log_interval": 0,
        "checkpoint": [{"type": "huggingface", "save_end_of_training": True}],
        **changes,
    }  # fmt: skip


def trained(folder: Path, keys: dict[str, Any]) -> list[dict[str, float]]:
    """The evaluations of a run of the command, which says nothing of weights and types that it is to know."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    code, out, err = run("run", path)
    assert code == 0, err
    assert not re.search("newly initialized|LOAD REPORT|You are using a model of type", out + err)
    assert ("after `import ptrain_swiftkv.models`" in " ".join(out.split())) == (keys["type"] == "swiftkv")
    lines = [json.loads(line) for line in Path(keys["output_dir"], "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/loss" in line]


def test_the_student_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    """On held-out questions the loss falls by more than half, and both think the same token likeliest more often."""
    llama = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    tokenizer = {"type": "train", "vocab_size": 800, "chat_template": "chatml"}
    trained(tmp_path, recipe(tmp_path, "sft", {"config": llama}, tokenizer=tokenizer))
    student = {"name_or_path": str(tmp_path / "sft" / "model" / "latest"), "num_key_value_layers": 2}
    keys = recipe(tmp_path, "swiftkv", {**student, "key_value_group_size": 2}, eval_at_start=True)
    first, *_, last = trained(tmp_path, keys)
    assert last["eval/loss"] < first["eval/loss"] / 2
    assert last["eval/teacher_agreement"] > first["eval/teacher_agreement"] + 0.02

    from transformers import AutoModelForCausalLM

    import ptrain_swiftkv.models  # noqa: F401 - so that transformers knows it

    result = (tmp_path / "swiftkv" / "model" / "latest").resolve()
    model: Any = AutoModelForCausalLM.from_pretrained(result)
    assert model.config.swiftkv and model.config.architectures == ["LlamaSwiftKVForCausalLM"]
    prompt = torch.arange(3, 23)[None]
    made = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.shape == (1, 25)

    further = recipe(tmp_path, "swiftkv", {"name_or_path": str(result)}, eval_at_start=True, train_iters=1)
    again, *_ = trained(tmp_path, {**further, "output_dir": str(tmp_path / "further")})
    assert again["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5), "it begins where the student was"
