"""Fixtures of saving and exporting: tiny models on disk, and real workers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with tiny Llamas: `tied`, and `untied` with generation settings that transformers refuses to save."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: at for at, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=special[0], pad_token=special[0])
    tokenizer.add_special_tokens({"extra_special_tokens": special[1:]})
    folders = {}
    for kind in ("tied", "untied"):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64, intermediate_size=129, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=kind == "tied",
            eos_token_id=0, bos_token_id=None, pad_token_id=0, mlp_bias=True, use_cache=False,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if kind == "untied":
            settings = {"temperature": 0.7, "do_sample": False, "eos_token_id": 0}
            (folder / "generation_config.json").write_text(json.dumps(settings))
        folders[kind] = str(folder)
    return folders


@pytest.fixture(scope="session")
def workers() -> Callable[[Sequence[Mapping[str, Any]], int, Path], list[dict[str, Any]]]:
    """Runs cases of `tiny_runs.py` one after another, on a number of workers, in a folder."""
    return _start


def _start(cases: Sequence[Mapping[str, Any]], workers: int, folder: Path) -> list[dict[str, Any]]:
    """The results of the cases on so many real workers."""
    folder.mkdir(parents=True, exist_ok=True)
    named = [{**case, "dir": str(folder / str(number))} for number, case in enumerate(cases)]
    _several("tiny_runs.py", [], named, workers, folder)
    return [json.loads((Path(case["dir"]) / "result.json").read_text()) for case in named]


@pytest.fixture(scope="session")
def several() -> Callable[[str, list[str], Sequence[Mapping[str, Any]], int, Path], None]:
    """Runs `script *arguments CASES.json`, a file of this folder, as a number of workers."""
    return _several


def _several(script: str, arguments: list[str], cases: Sequence[Mapping[str, Any]], workers: int, folder: Path) -> None:
    listed = folder / "cases.json"
    listed.write_text(json.dumps(list(cases)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ, "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DISABLE": "1",
    }  # fmt: skip
    processes, logs = [], [folder / f"worker-{rank}.log" for rank in range(workers)]
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(HERE / script), *arguments, str(listed)]
            processes.append(subprocess.Popen(command, env=own, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError("\n".join(log.read_text()[-4000:] for log in logs))
