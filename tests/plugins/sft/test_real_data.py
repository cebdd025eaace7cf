"""Short real runs on the real data files, with rows, tokens and labels counted in another way too."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from harness import losses, run_workers

from ptrain.data.cache import Prepared, open_prepared
from ptrain.job import prepare_run
from ptrain.recipe.load import load_recipe

DATA = Path(__file__).parents[4] / "shared" / "data"
SFT = ["gsm8k_train", "medquad_qa", "self_instruct_human", "sgd_multiturn"]
TOOLS = ["sgd_tool_dialogues.messages", "tau_airline_trajectories"]
END = "<|im_end|>"
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data files are not there (../shared/data)")


def recipe(kind: str, source: dict[str, Any], **data: Any) -> dict[str, Any]:
    """Three steps of a tiny model."""
    return {
        "type": kind,
        "model": {"config": LLAMA, "dtype": "fp32"},
        "tokenizer": {"type": "train", "vocab_size": 600},
        "data": {"sources": [source], **data},
        "optimizer": {"lr": 1e-3},
        "exit_iteration": 3,
        "loss_log_interval": 0,
    }


def recipes() -> dict[str, dict[str, Any]]:
    """Every set, by name; those of `sft` packed too."""
    made = {}
    for name in SFT:
        source = {"type": "jsonl", "path": str(DATA / "sft" / f"{name}.messages.jsonl.gz")}
        length = 4096 if name == "medquad_qa" else 2048
        made[name] = recipe("sft", source, max_length=length)
        made[f"{name} packed"] = recipe("sft", source, max_length=length, pack_samples=True)
    for name in TOOLS:
        source = {"type": "jsonl", "path": str(DATA / "tools" / f"{name}.jsonl.gz")}
        made[name] = recipe("sft", source, max_length=32768)
    text = {"type": "txt", "path": str(DATA / "causal" / "tinyshakespeare.txt.gz"), "separator": "\n\n"}
    return {**made, "text": recipe("causal", text, max_length=256)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    """The prepared data of every recipe, after three steps of training on each."""
    folder = tmp_path_factory.mktemp("real")
    specs = {}
    for name, one in recipes().items():
        changes = [f"output_dir={folder / name.replace(' ', '-')}", f"data.cache_dir={folder / 'cache'}"]
        specs[name] = prepare_run(load_recipe(one, changes), None)
    run_workers(list(specs.values()), 1)
    for name, spec in specs.items():
        assert len(losses(spec)) == 3 and all(0 < loss < 10 for loss in losses(spec)), name
    return {name: open_prepared(Path(json.loads(spec.read_text())["prepared"])) for name, spec in specs.items()}


def conversations(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def count_turns(tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[int, int]:
    """Tokens and labels of ChatML written by hand: each answer is encoded by itself, what lies between likewise."""
    between, answers = [], []
    for row in rows:
        text = ""
        for message in row["messages"]:
            text += f"<|im_start|>{message['role']}\n"
            if message["role"] == "assistant":
                between.append(text)
                answers.append(message["content"] + END)
                text = "\n"
            else:
                text += f"{message['content']}{END}\n"
        between.append(text)
    sizes = [sum(map(len, tokenizer(part)["input_ids"])) for part in (between, answers)]
    return sum(sizes), sizes[1]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", SFT)
def test_conversations(name: str, packed: bool, trained: dict[str, Prepared]) -> None:
    """Nothing is dropped; packed or not, the tokens are the same ones."""
    prepared = trained[f"{name} packed" if packed else name]
    rows = conversations(DATA / "sft" / f"{name}.messages.jsonl.gz")
    report = prepared.report["train"]
    tokens, labels = count_turns(prepared.tokenizer(), rows)
    assert (report["rows"], report["documents"], report["dropped"]) == (len(rows), len(rows), {})
    assert (report["tokens"], report["supervised_tokens"]) == (tokens, labels)
    assert report["turns"] == sum(m["role"] == "assistant" for row in rows for m in row["messages"])
    assert report["unended_turns"] == 0
    assert sum(map(len, prepared.train["input_ids"])) == tokens
    assert sum(map(len, prepared.train["document_lengths"])) == len(rows)
    if packed:
        assert max(map(len, prepared.train["input_ids"])) <= (4096 if name == "medquad_qa" else 2048)
        assert report["fullness"] >= 0.99 or name == "self_instruct_human"  # too few rows for the last one not to count


@pytest.mark.parametrize("name", TOOLS)
def test_tool_dialogues(name: str, trained: dict[str, Prepared]) -> None:
    """Calls are learnt, results are not: as many labels as transformers' own mask has."""
    prepared = trained[name]
    tokenizer, rows = prepared.tokenizer(), conversations(DATA / "tools" / f"{name}.jsonl.gz")
    tokens = labels = 0
    for row in rows:
        for message in row["messages"]:
            for call in message.get("tool_calls") or []:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        tools = json.loads(row["tools"]) if row.get("tools") else None
        found = tokenizer.apply_chat_template(
            row["messages"], tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens += len(found["input_ids"])
        labels += sum(found["assistant_masks"])
    report = prepared.report["train"]
    assert (report["rows"], report["samples"], report["tokens"]) == (len(rows), len(rows), tokens)
    assert report["supervised_tokens"] == labels


def test_text(trained: dict[str, Prepared]) -> None:
    """Every token but those of the last partial sample."""
    prepared = trained["text"]
    text = gzip.decompress((DATA / "causal" / "tinyshakespeare.txt.gz").read_bytes()).decode()
    pieces = [piece for piece in text.split("\n\n") if piece.strip()]
    tokens = sum(map(len, prepared.tokenizer()(pieces)["input_ids"])) + len(pieces)  # one EOS each, no BOS
    report = prepared.report["train"]
    assert (report["rows"], report["samples"], report["lost_tokens"]) == (len(pieces), tokens // 256, tokens % 256)
    assert report["tokens"] == report["supervised_tokens"] == tokens // 256 * 256
    assert set(map(len, prepared.train["input_ids"])) == {256}
