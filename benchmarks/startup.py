"""How long until something happens: `--help`, `check`, and from `ptrain run` to the first optimizer step.

    python benchmarks/startup.py

Wall time of whole processes. The bare script imports torch, transformers and deepspeed and builds the model of the
quickstart recipe: the least that any training with them costs before its first step.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import harness

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
TIMES = 10
BARE = """
import torch, transformers, deepspeed, yaml
keys = yaml.safe_load(open({recipe!r}))["model"]["config"]
config = transformers.AutoConfig.for_model(**keys, vocab_size=512)
model = transformers.AutoModelForCausalLM.from_config(config)
torch.optim.AdamW(model.parameters())
"""


def _median(command: list[str]) -> Mapping[str, float]:
    times = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(times)}


def help_(options: argparse.Namespace) -> Mapping[str, float]:
    """`ptrain --help`."""
    return _median([sys.executable, "-m", "ptrain_cli", "--help"])


def check(options: argparse.Namespace) -> Mapping[str, float]:
    """`ptrain check` of the quickstart recipe."""
    return _median([sys.executable, "-m", "ptrain_cli", "check", str(RECIPE)])


def bare(options: argparse.Namespace) -> Mapping[str, float]:
    """The bare script."""
    return _median([sys.executable, "-c", BARE.format(recipe=str(RECIPE))])


def first_step(options: argparse.Namespace) -> Mapping[str, float]:
    """`ptrain run` with prepared data, until the first step is written down."""
    folder, times = Path(tempfile.mkdtemp()), []
    data = ["-o", f"data.cache_dir={folder / 'cache'}"]
    subprocess.run(
        [sys.executable, "-m", "ptrain_cli", "prepare", str(RECIPE), *data], stdout=subprocess.DEVNULL, check=True
    )
    for number in range(TIMES // 2):
        metrics = folder / f"run-{number}" / "metrics.jsonl"
        command = [sys.executable, "-m", "ptrain_cli", "run", str(RECIPE), *data, "-o", "eval_at_start=false"]
        begin = time.perf_counter()
        process = subprocess.Popen([*command, "-o", f"output_dir={metrics.parent}"], stdout=subprocess.DEVNULL)
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit("the run ended before its first step")
            time.sleep(0.005)
        times.append(time.perf_counter() - begin)
        process.kill()
        process.wait()
    return {"seconds": statistics.median(times)}


CASES: Mapping[str, harness.Case] = {"help": help_, "check": check, "bare": bare, "first step": first_step}
RATIOS = {
    "to the first step, ptrain run to the bare script": harness.Ratio(
        "first step.seconds", "bare.seconds", "less", 1.5
    ),
    "ptrain check to the bare script": harness.Ratio("check.seconds", "bare.seconds", "less"),
    "ptrain --help to the bare script": harness.Ratio("help.seconds", "bare.seconds", "less"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Each case already takes the median of several runs."""
    parser.set_defaults(rounds=3)


if __name__ == "__main__":
    sys.exit(harness.main("startup", CASES, RATIOS, add))
