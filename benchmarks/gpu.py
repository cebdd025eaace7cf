"""A step of fine-tuning, and of SwiftKV, on one GPU: tokens per second, share of the matrix rate, memory, costs.

    python benchmarks/gpu.py [--shape 8b] [--length 8192] [--data FILE]

A Llama of the shape of Llama-3.1-8B with random weights in bf16, packed rows, activations recomputed, AdamW. Weights,
gradients and the optimizer's states are all bf16, as those in fp32 would take 128 GB. `bare` is a plain loop over the
same rows: transformers' model with sdpa and its block mask, its loss over all positions, torch's AdamW. `compiled`
is ptrain's with `model.compile: true`. `swiftkv` keeps half of the layers; `swiftkv bare` is `naive` of `swiftkv.py`:
the whole teacher and student, all logits of both.

`MFU` is the arithmetic that a step needs over the time it takes, as a share of the rate of one large product measured
in the same process: 6 FLOP for each weight of the layers and token, 6 for each weight of the head and label, and
6 x hidden size x layers x n^2 for the causal attention within a document of n tokens. Of SwiftKV, 2 FLOP for each
weight of the teacher, 4 for each of the student's later layers (all but its projections are frozen), 2 more for each
that is trained, 6 for the head; of attention a third for each pass. What is computed twice, in the backward pass of
recomputed activations, is not counted. Without a GPU, only `--shape tiny` runs, to try the script.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness
import inputs
import swiftkv
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
    "tiny": {**LLAMA, **inputs.TINY, "num_attention_heads": 8, "num_hidden_layers": 2},
}  # fmt: skip


def device() -> str:
    """What the run will use."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def recipe(trainer: str, options: argparse.Namespace, folder: Path, compiled: bool = False) -> dict[str, Any]:
    """What ptrain runs; the bare loop reads the rows that are prepared for it."""
    kept = {"num_key_value_layers": SHAPES[options.shape]["num_hidden_layers"] // 2} if trainer == "swiftkv" else {}
    rows = inputs.written(options.data, 60 * (WARM + options.steps + 2) * options.length // 8192 + 200)
    inputs.tokenizer(rows).save_pretrained(folder / "tokenizer")
    return {
        "type": trainer,
        "model": {
            "config": {"model_type": "llama", **SHAPES[options.shape]},
            "dtype": "bf16",
            "compile": compiled,
            **kept,
        },
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

    def numbers(self, trainer: str, options: argparse.Namespace, rows: Any) -> dict[str, float]:
        """The median step, rates, memory, and the five largest costs in per cent of the profiled step."""
        import torch

        steps = [b - a for a, b in zip(self.times[WARM:], self.times[WARM + 1 : self.last], strict=False)]
        seconds, (tokens, flop) = statistics.median(steps), needed(trainer, options, rows)
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


def needed(trainer: str, options: argparse.Namespace, rows: Any) -> tuple[float, float]:
    """Tokens and FLOP of the mean step, by the formula above."""
    shape = SHAPES[options.shape]
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    keys = hidden * shape["num_key_value_heads"] // heads
    trained = hidden * hidden + 2 * hidden * keys
    weights = trained + hidden * hidden + 3 * hidden * shape["intermediate_size"]
    # FLOP of a layer: for each token, and for the squared length of each document.
    layer, attention = 6 * layers * weights, 6 * hidden * layers
    if trainer == "swiftkv":
        late = layers // 2
        layer, attention = 2 * layers * weights + late * (4 * weights + 2 * trained), 2 * hidden * (layers + 2 * late)
    tokens = labels = squares = 0
    for row in rows:
        tokens += len(row["input_ids"])
        labels += int((row["labels"] != -100).sum())
        squares += int((row["document_lengths"].astype("int64") ** 2).sum())
    whole = layer * tokens + 6 * shape["vocab_size"] * hidden * labels + attention * squares
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


def ptrain(trainer: str, options: argparse.Namespace, compiled: bool = False) -> Mapping[str, float]:
    """`ptrain run`."""
    if compiled:
        os.environ.pop("TORCHDYNAMO_DISABLE", None)  # the harness sets it
    from ptrain import engine, loop
    from ptrain.job import open_spec, prepare_run
    from ptrain.recipe.load import load_recipe

    spec = prepare_run(load_recipe(recipe(trainer, options, Path(tempfile.mkdtemp()), compiled)), None)
    engine.start(device(), 0)
    clock = Clock(options.steps)

    run = open_spec(spec, harness.Looks(clock.look))
    loop.train(run)
    return clock.numbers(trainer, options, run.train_data.with_format("numpy"))


def bare(trainer: str, options: argparse.Namespace) -> Mapping[str, float]:
    """A plain loop."""
    import torch

    from ptrain.job import prepare_data
    from ptrain.recipe.load import load_recipe

    folder = Path(tempfile.mkdtemp())
    _, prepared = prepare_data(load_recipe(recipe(trainer, options, folder)), folder / "run")
    rows = prepared.train.with_format("numpy")
    model = student(options) if trainer == "swiftkv" else plain(options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    clock = Clock(options.steps)
    for step in range(WARM + options.steps + 2):
        batch = {name: value.to(device()) for name, value in padded([rows[step % len(rows)]], packed=True)[0].items()}
        loss = swiftkv.plain_loss(model, batch) if trainer == "swiftkv" else model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.look()
    return clock.numbers(trainer, options, rows)


def plain(options: argparse.Namespace) -> Any:
    """The model that is fine-tuned, on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device()):
        config = AutoConfig.for_model("llama", **SHAPES[options.shape])
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()


def student(options: argparse.Namespace) -> Any:
    """The one that is distilled, which is its own teacher."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import ptrain_swiftkv.models  # noqa: F401 - so that it is known
    from ptrain_swiftkv.student import begin, freeze, student_config

    base = AutoConfig.for_model("llama", **SHAPES[options.shape])
    with torch.device(device()):
        config = student_config(base, base.num_hidden_layers // 2, 1)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()
    begin(model)
    freeze(model)
    return model


def add(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--data", type=Path, help="a file of conversations; by default they are generated")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of the model (default 8b)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row (default 8,192)")
    parser.add_argument("--steps", type=int, default=10, help="that are measured (default 10)")
    parser.add_argument("--profile", type=Path, help="a file for the table of the profiler")
    parser.set_defaults(rounds=2)


CASES: dict[str, harness.Case] = {
    "ptrain": partial(ptrain, "sft"),
    "compiled": partial(ptrain, "sft", compiled=True),
    "bare": partial(bare, "sft"),
    "swiftkv": partial(ptrain, "swiftkv"),
    "swiftkv bare": partial(bare, "swiftkv"),
}
RATIOS = {
    "tokens per second, ptrain to bare": harness.Ratio("ptrain.tokens/s", "bare.tokens/s", "more"),
    "tokens per second, compiled to not": harness.Ratio("compiled.tokens/s", "ptrain.tokens/s", "more"),
    "memory, ptrain to bare": harness.Ratio("ptrain.GiB", "bare.GiB", "less"),
    "swiftkv, tokens per second, ptrain to bare": harness.Ratio("swiftkv.tokens/s", "swiftkv bare.tokens/s", "more"),
    "swiftkv, memory, ptrain to bare": harness.Ratio("swiftkv.GiB", "swiftkv bare.GiB", "less", 0.5),
}

if __name__ == "__main__":
    if device() == "cpu" and "tiny" not in sys.argv:
        sys.exit(print("gpu: there is no GPU here, so nothing is measured; `--shape tiny` tries the script"))
    sys.exit(harness.main("gpu", CASES, RATIOS, add))
