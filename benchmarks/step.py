"""Time and memory of training steps beside a bare PyTorch loop and TRL: same model, optimizer, data and batch.

    python benchmarks/step.py [--data FILE]

One process, fp32 on CPU, ZeRO 0. The bare loop is what one would write by hand: padded or packed batches, one call of
the model with transformers' sdpa (for packed rows with the block mask that transformers makes of `position_ids`),
AdamW, clipping, a schedule. Times are CPU time of the process, which a busy machine disturbs least. Tokens are those of
the data, without padding. `at rate` is the share of a step in which this core would do the step's matrix products (as
torch counts them) at the rate of one large product: the limit is 1.
"""

from __future__ import annotations

import argparse
import resource
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

SMALL = {
    "hidden_size": 384, "intermediate_size": 1920, "num_hidden_layers": 8, "num_attention_heads": 6,
    "vocab_size": inputs.VOCABULARY,
}  # fmt: skip
"""25.6M parameters."""
SETTINGS: dict[str, dict[str, Any]] = {
    "micro1": {"model": inputs.TINY, "length": 512, "packed": False, "batch": 1, "steps": 80},
    "micro8": {"model": inputs.TINY, "length": 512, "packed": False, "batch": 8, "steps": 20},
    "packed512": {"model": inputs.TINY, "length": 512, "packed": True, "batch": 2, "steps": 20},
    "packed2048": {"model": SMALL, "length": 2048, "packed": True, "batch": 1, "steps": 3},
}
WARM = 3
"""Steps before the clock starts."""
ROWS = 2_000


class Clock:
    """Looked at after each step: when that was, in CPU seconds, and how many tokens had been trained."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.before = memory()

    def look(self) -> None:
        """Note the time."""
        self.times.append(time.process_time())

    def numbers(self, tokens: float) -> dict[str, float]:
        """The median step, the rate, and the memory above what the imports took."""
        steps = [b - a for a, b in zip(self.times[WARM:], self.times[WARM + 1 :], strict=False)]
        whole = sum(steps)
        rate = tokens / (len(self.times) - 1) * len(steps) / whole
        return {"ms": 1000 * statistics.median(steps), "tokens/CPU-s": rate, "MiB": memory() - self.before}


def memory() -> float:
    """The highest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def recipe(setting: Mapping[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What ptrain runs; the bare loop reads the rows that are prepared for it."""
    rows = inputs.written(options.data, ROWS)
    inputs.tokenizer(rows).save_pretrained(folder / "tokenizer")
    return {
        "type": "sft",
        "model": {"config": {"model_type": "llama", **setting["model"], "tie_word_embeddings": False}, "dtype": "fp32"},
        "tokenizer": {"name_or_path": str(folder / "tokenizer")},
        "data": {
            "sources": [{"type": "jsonl", "path": str(rows)}],
            "cache_dir": str(folder / "cache"),
            "max_length": setting["length"],
            "overlength": "truncate_right",
            "max_unsupervised": 1.0,
            "pack_samples": setting["packed"],
        },
        "optimizer": {"lr": 1e-4},
        "micro_batch_size": setting["batch"],
        "train_iters": WARM + setting["steps"] + 1,
        "loss_log_interval": 0,
        "output_dir": str(folder / "run"),
        "checkpoint": [],
    }


def ptrain(setting: Mapping[str, Any], options: argparse.Namespace) -> Mapping[str, float]:
    """`ptrain run`, from the first step on."""
    from torch.utils.flop_counter import FlopCounterMode

    from ptrain import engine, loop
    from ptrain.job import open_spec, prepare_run
    from ptrain.recipe.load import load_recipe

    spec = prepare_run(load_recipe(recipe(setting, options, Path(tempfile.mkdtemp()))), None)
    engine.start("cpu", 0)
    clock, counter = Clock(), FlopCounterMode(display=False)

    class Looks:
        """Where the loop asks after each step whether it has to stop."""

        @property
        def requested(self) -> bool:
            clock.look()
            if len(clock.times) == 1:
                counter.__enter__()
            elif len(clock.times) == 2:
                counter.__exit__(None, None, None)
            return False

    run = open_spec(spec, Looks())
    loop.train(run)
    numbers = clock.numbers(run.progress.tokens)
    ideal = counter.get_total_flops() / matrix_rate()
    return {**numbers, "at rate": 1000 * ideal / numbers["ms"]}


def matrix_rate() -> float:
    """FLOP per CPU second of one large product in fp32."""
    import torch

    one, times = torch.randn(2048, 2048), []
    for _ in range(6):
        begin = time.process_time()
        one @ one
        times.append(time.process_time() - begin)
    return 2 * 2048**3 / min(times)


def bare(setting: Mapping[str, Any], options: argparse.Namespace) -> Mapping[str, float]:
    """A plain loop."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

    from ptrain.job import prepare_data
    from ptrain.recipe.load import load_recipe

    folder = Path(tempfile.mkdtemp())
    loaded = load_recipe(recipe(setting, options, folder))
    _, prepared = prepare_data(loaded, folder / "run")
    rows = prepared.train.with_format("numpy")
    clock = Clock()
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **setting["model"], tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    steps, tokens = WARM + setting["steps"] + 1, 0
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=5, num_training_steps=steps)
    # ptrain's own order, so that both train on the same rows.
    drawn = np.random.Generator(np.random.PCG64(np.random.SeedSequence([loaded.recipe.data.seed, 0])))
    order = drawn.permutation(len(rows)).tolist()
    for step in range(steps):
        chosen = [order[(step * setting["batch"] + at) % len(order)] for at in range(setting["batch"])]
        batch, count = padded([rows[at] for at in chosen], setting["packed"])
        out = model(**batch, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        float(out.loss.detach())
        tokens += count
        clock.look()
    return clock.numbers(tokens)


def padded(rows: list[Any], packed: bool) -> tuple[dict[str, Any], int]:
    """Padded (or packed) rows as the model's own arguments, and their tokens."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    longest = -(-longest // 8) * 8
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for at, row in enumerate(rows):
        count, start = len(row["input_ids"]), 0
        ids[at, :count], labels[at, :count] = (torch.from_numpy(row[key]).long() for key in ("input_ids", "labels"))
        mask[at, :count] = 1
        for length in row["document_lengths"].tolist():
            labels[at, start] = -100
            positions[at, start : start + length] = torch.arange(length)
            start += length
        positions[at, count:] = torch.arange(longest - count)
    extra = {"position_ids": positions} if packed else {"attention_mask": mask}
    return {"input_ids": ids, "labels": labels, **extra}, int(mask.sum())


def trl(setting: Mapping[str, Any], options: argparse.Namespace) -> Mapping[str, float]:
    """TRL's `SFTTrainer`."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports] - of requirements-bench.txt

    rows = inputs.written(options.data, ROWS)
    tokenizer = inputs.tokenizer(rows)
    data = load_dataset("json", data_files=str(rows), split="train")
    clock = Clock()
    config = LlamaConfig(**setting["model"], tie_word_embeddings=False)
    model = LlamaForCausalLM(config)

    class Looks(TrainerCallback):
        """After each step."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.look()

    asked = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=setting["length"], packing=setting["packed"],
        assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=setting["batch"], max_steps=WARM + setting["steps"] + 1, learning_rate=1e-4,
        max_grad_norm=1.0, logging_strategy="no", save_strategy="no", disable_tqdm=True, include_num_input_tokens_seen=
        "non_padding",
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=asked, train_dataset=data, processing_class=tokenizer, callbacks=[Looks()])
    trainer.train()
    return clock.numbers(trainer.state.num_input_tokens_seen)


def add(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--data", type=Path, help="a file of conversations; by default they are generated")
    parser.set_defaults(rounds=3)


def cases() -> dict[str, harness.Case]:
    """Each of the three in each setting."""
    sides = {"bare": bare, "ptrain": ptrain, "trl": trl}
    return {
        f"{name}.{side}": partial(run, setting) for name, setting in SETTINGS.items() for side, run in sides.items()
    }


RATIOS = {
    "micro batch 1, time per step, ptrain to bare": harness.Ratio("micro1.ptrain.ms", "micro1.bare.ms", "less", 1.1),
    "micro batch 8, time per step, ptrain to bare": harness.Ratio("micro8.ptrain.ms", "micro8.bare.ms", "less"),
    **{
        f"packed {length}, tokens per second, ptrain to {side}": harness.Ratio(
            f"packed{length}.ptrain.tokens/CPU-s", f"packed{length}.{side}.tokens/CPU-s", "more", target
        )
        for length, side, target in ((512, "bare", 1.7), (512, "trl", 2.2), (2048, "bare", 1.35), (2048, "trl", 1.35))
    },
    **{
        f"{name}, memory, ptrain to bare": harness.Ratio(f"{name}.ptrain.MiB", f"{name}.bare.MiB", "less", 0.9)
        for name in ("packed512", "packed2048")
    },
}

if __name__ == "__main__":
    sys.exit(harness.main("step", cases(), RATIOS, add))
