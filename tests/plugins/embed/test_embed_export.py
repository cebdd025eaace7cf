"""`ptrain export` of a run of `embed`: sentence-transformers makes the vectors of the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import embed_mined
import pytest
import torch
import yaml
from harness import run

from ptrain.testing.workers import run_workers

TEXTS = ["w3 w4 w5", "w9", "w10 w11 w12 w13 w14 w15 w16"]
CODE = f"""
import json
from pathlib import Path
import ptrain

@ptrain.hookimpl
def on_end(run):
    from ptrain_embed.encoder import Encoder
    made = {{kind: Encoder.of(run).encode({TEXTS!r}, kind).tolist() for kind in ("query", "document")}}
    (run.dir / "vectors.json").write_text(json.dumps(made))
"""
LORA = {"peft_config": {"r": 4, "target_modules": ["query", "value"]}}
RESUMABLE, OWN = ({"type": kind, "save_end_of_training": True} for kind in ("deepspeed", "sentence-transformers"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and code that writes down the vectors of the model in training at its end."""
    folder = tmp_path_factory.mktemp("export")
    run_workers(embed_mined.written, folder, log=folder / "log")
    (folder / "vectors.py").write_text(CODE)
    return folder


@pytest.mark.parametrize(
    ("model", "saved", "merge"),
    [
        ({}, RESUMABLE, [False]),
        ({**LORA, "pooling": "cls"}, RESUMABLE, [False, True]),
        ({**LORA, "projection": 16, "normalize": False}, OWN, [True]),
    ],
    ids=["default", "adapter", "adapter-exported-with-projection"],
)
def test_the_vectors_are_those_of_the_run(data: Path, model: dict[str, Any], saved: Any, merge: list[bool]) -> None:
    """Whether the export is of all weights, of an adapter, or of one that is merged."""
    name = f"{len(model)}-{saved['type']}"
    keys = {
        "type": "embed", "temperature": 0.1, "micro_batch_size": 4, "train_iters": 4, "output_dir": name,
        "model": {"name_or_path": "model", "dtype": "fp32", "query_prompt": "w1 w2 ", **model},
        "data": {"sources": [{"type": "jsonl", "path": "rows.jsonl"}], "cache_dir": "cache"},
        "optimizer": {"lr": 0.01}, "checkpoint": [saved],
    }  # fmt: skip
    (data / f"{name}.yaml").write_text(yaml.safe_dump(keys))
    code, _, err = run("run", f"{name}.yaml", "--code", "vectors.py", cwd=data)
    assert code == 0, err
    expected = json.loads((data / name / "vectors.json").read_text())
    for one in merge:
        words = ["--to", f"{name}-{one}", *(["--merge"] if one else [])]
        code, _, err = run("export", name, "--code", "vectors.py", *words, cwd=data)
        assert code == 0, err
        folder = data / f"{name}-{one}"
        assert (folder / "adapter_config.json").exists() == (bool("peft_config" in model) and not one)
        check(folder, expected)


def check(folder: Path, expected: dict[str, Any]) -> None:
    """The vectors of both kinds of texts, as sentence-transformers makes them."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    for kind, vectors in expected.items():
        found = torch.as_tensor(model.encode(TEXTS, prompt_name=kind))
        torch.testing.assert_close(found, torch.tensor(vectors), atol=1e-6, rtol=1e-6)
