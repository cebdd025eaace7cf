"""A step of supervised fine-tuning on one GPU: tokens per second, share of the matrix rate, memory, largest costs.

    python benchmarks/gpu.py [--shape 8b] [--length 8192] [--data FILE]

A Llama of the shape of Llama-3.1-8B with random weights in bf16, packed rows, activations recomputed, AdamW. Weights,
gradients and the optimizer's states are all bf16, as those in fp32 would take 128 GB. `bare` is a plain loop over the
same rows: transformers' model with sdpa and its block mask, its loss over all positions, torch's AdamW.

`MFU` is the arithmetic that a step needs over the time it takes, as a share of the rate of one large product measured
in the same process: 6 FLOP for each weight of the layers and token, 6 for each weight of the head and label, and
6 x hidden size x layers x n^2 for the causal attention within a document of n tokens. What is computed twice, in the
backward pass of recomputed activations, is not counted. Without a GPU, only `--shape tiny` runs, to try the script.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import inputs
from step import memory, padded

WARM = 3
"""Steps before the clock starts."""
LLAMA = {"num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 128256,
    },
    "1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "vocab_size": 128256,
    },
    "tiny": {**LLAMA, **inputs.TINY, "num_attention_heads": 8},
}  # fmt: skip


def device() -> str:
    """What the run will use."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What ptrain runs; the bare loop reads the rows that are prepared for it."""
    rows = inputs.written(options.data, 60 * (WARM + options.steps + 2) * options.length // 8192 + 200)
    inputs.tokenizer(rows).save_pretrained(folder / "tokenizer")
    return {
        "type": "sft",
        "model": {"config": {"model_type": "llama", **SHAPES[options.shape]}, "dtype": "bf16"},
        "tokenizer": {"name_or_path": str(folder / "tokenizer")},
        "data": {
            "sources": [{"type": "jsonl", "path": str(rows)}],
            "cache_dir": str(folder / "cache"),
            "max_length": options.length,
            "overlength": "truncate_right",
            "pack_samples": True,
        },
        "optimizer": {"lr": 1e-5},
        "deepspeed": {
            "zero_optimization": {"stage": 2},
            "bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        },
        "train_iters": WARM + options.steps + 2,
        "loss_log_interval": 1,
        "output_dir": str(folder / "run"),
        "checkpoint": [],
    }


class Clock:
    """Looked at after each step; the step after the last that counts is profiled."""

    def __init__(self, steps: int) -> None:
        self.times: list[float] = []
        self.last = WARM + steps + 1
        self.profile: Any = None

    def look(self) -> None:
        """Note the time at which all work given to the device is done."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        if device() == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if len(self.times) == self.last:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device() == "cuda" else [])]
            self.profile = profile(activities=activities)
            self.profile.__enter__()
        elif len(self.times) == self.last + 1:
            self.profile.__exit__(None, None, None)

    def numbers(self, options: argparse.Namespace, rows: Any) -> dict[str, float]:
        """The median step, rates, memory, and the five largest costs in per cent of the profiled step."""
        import torch

        steps = [b - a for a, b in zip(self.times[WARM:], self.times[WARM + 1 : self.last], strict=False)]
        seconds, (tokens, flop) = statistics.median(steps), needed(options, rows)
        held = torch.cuda.max_memory_allocated() / 2**30 if device() == "cuda" else memory() / 1024
        rate = matrix_rate()
        return {
            "ms": 1000 * seconds,
            "tokens/s": tokens / seconds,
            "MFU": flop / seconds / rate,
            "matrix TFLOP/s": rate / 1e12,
            "GiB": held,
            **self.costs(options),
        }

    def costs(self, options: argparse.Namespace) -> dict[str, float]:
        """By name; the whole table goes to `--profile`."""
        averages = self.profile.key_averages()
        field = "self_device_time_total" if device() == "cuda" else "self_cpu_time_total"
        found = sorted(((getattr(one, field), one.key) for one in averages), reverse=True)
        if options.profile:
            options.profile.write_text(averages.table(sort_by=field, row_limit=50))
        whole = sum(spent for spent, _ in found)
        return {f"% {name[:60]}": 100 * spent / whole for spent, name in found[:5]}


def needed(options: argparse.Namespace, rows: Any) -> tuple[float, float]:
    """Tokens and FLOP of the mean step, by the formula above."""
    shape = SHAPES[options.shape]
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    keys = hidden * shape["num_key_value_heads"] // heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * shape["intermediate_size"])
    tokens = labels = squares = 0
    for row in rows:
        tokens += len(row["input_ids"])
        labels += int((row["labels"] != -100).sum())
        squares += int((row["document_lengths"].astype("int64") ** 2).sum())
    whole = 6 * weights * tokens + 6 * shape["vocab_size"] * hidden * labels + 6 * hidden * layers * squares
    return tokens / len(rows), whole / len(rows)


def matrix_rate() -> float:
    """FLOP per second of a large product in bf16, measured here: the best of some."""
    import torch

    size = 8192 if device() == "cuda" else 512
    one, times = torch.randn(size, size, dtype=torch.bfloat16, device=device()), []
    for _ in range(20):
        begin = time.perf_counter()
        one @ one
        if device() == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def ptrain(options: argparse.Namespace) -> Mapping[str, float]:
    """`ptrain run`."""
    from ptrain import engine, loop
    from ptrain.job import open_spec, prepare_run
    from ptrain.recipe.load import load_recipe

    spec = prepare_run(load_recipe(recipe(options, Path(tempfile.mkdtemp()))), None)
    engine.start(device(), 0)
    clock = Clock(options.steps)

    class Looks:
        """Where the loop asks after each step whether it has to stop."""

        @property
        def requested(self) -> bool:
            clock.look()
            return False

    run = open_spec(spec, Looks())
    loop.train(run)
    return clock.numbers(options, run.train_data.with_format("numpy"))


def bare(options: argparse.Namespace) -> Mapping[str, float]:
    """A plain loop."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ptrain.job import prepare_data
    from ptrain.recipe.load import load_recipe

    folder = Path(tempfile.mkdtemp())
    _, prepared = prepare_data(load_recipe(recipe(options, folder)), folder / "run")
    rows = prepared.train.with_format("numpy")
    with torch.device(device()):
        config = AutoConfig.for_model("llama", **SHAPES[options.shape])
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    clock = Clock(options.steps)
    for step in range(WARM + options.steps + 2):
        batch, _ = padded([rows[step % len(rows)]], packed=True)
        model(**{name: value.to(device()) for name, value in batch.items()}, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.look()
    return clock.numbers(options, rows)


def add(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--data", type=Path, help="a file of conversations; by default they are generated")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of the model (default 8b)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row (default 8,192)")
    parser.add_argument("--steps", type=int, default=10, help="that are measured (default 10)")
    parser.add_argument("--profile", type=Path, help="a file for the table of the profiler")
    parser.set_defaults(rounds=2)


RATIOS = {
    "tokens per second, ptrain to bare": harness.Ratio("ptrain.tokens/s", "bare.tokens/s", "more"),
    "memory, ptrain to bare": harness.Ratio("ptrain.GiB", "bare.GiB", "less"),
}

if __name__ == "__main__":
    if device() == "cpu" and "tiny" not in sys.argv:
        sys.exit(print("gpu: there is no GPU here, so nothing is measured; `--shape tiny` tries the script"))
    sys.exit(harness.main("gpu", {"ptrain": ptrain, "bare": bare}, RATIOS, add))
