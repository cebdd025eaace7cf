"""Preparing conversations (render, tokenise, mask, pack): rows per second beside TRL, and beside encoding alone.

    python benchmarks/prepare.py [--data FILE] [--rows N]

All cases read the same file and make rows of 512 tokens with a label for each token of the assistant. `encoding` is
the floor: the tokenizer's own batch call on the rendered texts, with all cores and nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness
import inputs

LENGTH = 512


def ptrain(options: argparse.Namespace) -> Mapping[str, float]:
    """What `ptrain prepare` does in this process, from the file to the packed rows on disk."""
    from ptrain.job import prepare_data
    from ptrain.recipe.load import load_recipe

    folder = Path(tempfile.mkdtemp())
    rows = inputs.written(options.data, options.rows)
    inputs.tokenizer(rows).save_pretrained(folder / "tokenizer")

    def prepare(rows: Path) -> float:
        recipe = {
            "type": "sft",
            "model": {"name_or_path": "none"},
            "tokenizer": {"name_or_path": str(folder / "tokenizer")},
            "data": {
                "sources": [{"type": "jsonl", "path": str(rows)}],
                "cache_dir": str(folder / "cache"),
                "max_length": LENGTH,
                "overlength": "truncate_right",
                "pack_samples": True,
                "max_unsupervised": 1.0,
                "num_proc": options.processes,
            },
        }
        _, prepared = prepare_data(load_recipe(recipe), folder / "run")
        return prepared.report["train"]["fullness"]

    return _timed(options, rows, prepare)


def trl(options: argparse.Namespace) -> Mapping[str, float]:
    """The preparation of TRL's `SFTTrainer`: it happens when one is made."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports] - of requirements-bench.txt

    rows = inputs.written(options.data, options.rows)
    tokenizer = inputs.tokenizer(rows)
    model = LlamaForCausalLM(LlamaConfig(**inputs.TINY))

    def prepare(rows: Path) -> float:
        config = SFTConfig(
            output_dir=tempfile.mkdtemp(), max_length=LENGTH, packing=True, assistant_only_loss=True,
            report_to="none", use_cpu=True, bf16=False,
            dataset_num_proc=options.processes if options.processes > 1 else None,
        )  # fmt: skip
        data = load_dataset("json", data_files=str(rows), split="train")
        made = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
        packed: Any = made.train_dataset
        lengths = [sum(one) for one in packed["seq_lengths"]]
        return sum(lengths) / len(lengths) / LENGTH

    return _timed(options, rows, prepare)


def _timed(options: argparse.Namespace, rows: Path, prepare: Callable[[Path], float]) -> Mapping[str, float]:
    """Prepare a few rows first: what is imported or built once is no part of the rate."""
    prepare(inputs.written(options.data, 8))
    with Memory() as memory:
        begin = time.perf_counter()
        fullness = prepare(rows)
        seconds = time.perf_counter() - begin
    return {"rows/s": options.rows / seconds, "seconds": seconds, "MiB more": memory.more, "fullness": fullness}


def encoding(options: argparse.Namespace) -> Mapping[str, float]:
    """The tokenizer's batch call alone, on rendered texts."""
    rows = inputs.written(options.data, options.rows)
    tokenizer = inputs.tokenizer(rows)
    said = [one["messages"] for one in inputs.messages(options.data, options.rows)]
    texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in said]
    begin = time.perf_counter()
    for start in range(0, len(texts), 1000):
        tokenizer.backend_tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)
    seconds = time.perf_counter() - begin
    return {"rows/s": options.rows / seconds, "seconds": seconds}


class Memory:
    """How much more memory this process has taken within a context, in MiB; pages of mapped files are not counted."""

    def __enter__(self) -> Memory:
        self._before = self._most = _anonymous()
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look)
        self._looking.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._looking.join()

    @property
    def more(self) -> float:
        """At its highest."""
        return (self._most - self._before) / 1024

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self._most = max(self._most, _anonymous())


def _anonymous() -> int:
    """In KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def add(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--data", type=Path, help="a file of conversations; by default they are generated")
    parser.add_argument("--rows", type=int, default=7_473, help="of the small file (default 7,473)")
    parser.set_defaults(rounds=3)


def case(prepare: harness.Case, times: int, processes: int) -> harness.Case:
    """`prepare` for a file of so many times the rows."""

    def run(options: argparse.Namespace) -> Mapping[str, float]:
        return prepare(argparse.Namespace(data=options.data, rows=times * options.rows, processes=processes))

    return run


SIZES = {
    "": (1, 1, 2.5),
    ", two processes": (1, 2, 1.0),
    ", large": (20, 1, 1.5),
    ", large, two processes": (20, 2, 1.0),
}
"""How often the rows, in how many processes, and what the ratio should be at least."""
CASES: dict[str, harness.Case] = {"encoding": case(encoding, 1, 1), "encoding, large": case(encoding, 20, 1)}
RATIOS: dict[str, harness.Ratio] = {}
for size, (times, processes, target) in SIZES.items():
    CASES |= {f"ptrain{size}": case(ptrain, times, processes), f"trl{size}": case(trl, times, processes)}
    RATIOS[f"rows per second, ptrain to TRL{size}"] = harness.Ratio(
        f"ptrain{size}.rows/s", f"trl{size}.rows/s", "more", target
    )
for size in ("", ", large"):
    RATIOS[f"seconds, ptrain to encoding alone{size}"] = harness.Ratio(
        f"ptrain{size}.seconds", f"encoding{size}.seconds", "less"
    )

if __name__ == "__main__":
    sys.exit(harness.main("prepare", CASES, RATIOS, add))
