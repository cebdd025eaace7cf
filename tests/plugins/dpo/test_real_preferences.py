"""`dpo` on real pairs: solutions of GSM8K, right and wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from harness import run

DATA = Path(__file__).parents[4] / "shared" / "data" / "dpo" / "gsm8k_solutions.pref.jsonl.gz"
pytestmark = pytest.mark.skipif(not DATA.is_file(), reason=f"the data set {DATA.name} is not here")


def test_preference_accuracy_rises(tmp_path: Path) -> None:
    recipe = {
        "type": "dpo", "output_dir": str(tmp_path / "run"),
        "model": {"config": {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
        }, "dtype": "fp32"},
        "tokenizer": {"type": "train", "vocab_size": 1000, "chat_template": "chatml"},
        "data": {
            "sources": [{"type": "jsonl", "path": str(DATA), "sample_count": 1200}], "train_eval_split": [0.9, 0.1],
            "max_length": 512, "overlength": "drop", "cache_dir": str(tmp_path / "cache"),
        },
        "micro_batch_size": 8, "optimizer": {"lr": 2e-3}, "epochs": 1, "eval_interval": 20, "loss_log_interval": 0,
    }  # fmt: skip
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = run("run", tmp_path / "dpo.yaml")
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (
        [line[name] for line in lines if name in line][at]
        for name, at in (("eval/rewards/accuracies", 0), ("eval/rewards/accuracies", -1))
    )
    assert last > max(first, 0.6)
