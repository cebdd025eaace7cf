"""What all benchmarks share: cases in fresh processes, rounds interleaved, ratios within a round, a recorded result.

A benchmark is a script with cases that are compared. `python benchmarks/NAME.py` runs every case in a process of
its own, several rounds of them in turn, prints the medians and the ratios, and compares the ratios with those in
`benchmarks/results/NAME.json`: it fails where one is worse than recorded by more than the noise, which is how far the
rounds of both were apart. `--record` writes that file. A case is a function that returns numbers; its process imports
what it needs before it looks at the clock.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("ptrain-core", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "trl")
Case = Callable[[argparse.Namespace], Mapping[str, float]]
ROUND = "BENCHMARK_ROUND"
"""The variable with the number of the round, for cases that draw something else in each."""
TOO_NOISY = 0.3
"""Rounds that are so far apart, as a share of their median, would let anything pass."""


class Looks:
    """Where the loop asks after each step whether it has to stop: `look` is called, and the answer is no."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    @property
    def requested(self) -> bool:
        """No."""
        self._look()
        return False


@dataclass(frozen=True)
class Ratio:
    """How two cases compare.

    Attributes:
        over: the number of the first case divided by ...
        under: ... that of the second, in the same round; each is `case.number`.
        better: "more" or "less".
        target: what the ratio should be at least (or at most).
    """

    over: str
    under: str
    better: str
    target: float | None = None


def main(name: str, cases: Mapping[str, Case], ratios: Mapping[str, Ratio], add: Any = None, rounds: int = 5) -> int:
    """Run the benchmark that the command line asks for; the exit code.

    Args:
        name: of the result's file.
        cases: by name.
        ratios: by what they say.
        add: adds options of the benchmark's own to a parser.
        rounds: how often every case runs, unless the command line says otherwise.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--case", choices=cases, help="run one case in this process and print its numbers")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"how often every case runs (default {rounds})")
    parser.add_argument("--at-once", type=int, default=1, help="cases that run side by side, where times are CPU time")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS (default 1)")
    parser.add_argument("--record", action="store_true", help=f"write results/{name}.json instead of comparing")
    parser.add_argument("--json", type=Path, help="a file for what was measured")
    if add is not None:
        add(parser)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(dict(cases[options.case](options))))
        return 0
    rounds = [_round(cases, number, options) for number in range(options.rounds)]
    result = {**_environment(options), "cases": _medians(rounds), "ratios": _ratios(rounds, ratios)}
    _show(name, result, ratios)
    path = RESULTS / f"{name}.json"
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.record:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        return 0
    return _compare(result, json.loads(path.read_text()) if path.exists() else None, ratios)


def _round(cases: Mapping[str, Case], number: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The numbers of each case once, every one in a fresh process."""
    env = {
        **os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true",
        ROUND: str(number),
    }  # fmt: skip
    with ThreadPoolExecutor(options.at_once) as pool:
        return dict(zip(cases, pool.map(lambda case: _in_process(case, env), cases), strict=True))


def _in_process(case: str, env: Mapping[str, str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--case", case]
        own = {**env, "TMPDIR": folder, "HF_HOME": f"{folder}/hf"}
        done = subprocess.run(command, env=own, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the case `{case}` failed with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _value(one: Mapping[str, Mapping[str, float]], name: str) -> float:
    case, _, number = name.rpartition(".")
    return one[case][number]


def _medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        case: {name: statistics.median(one[case][name] for one in rounds if name in one[case]) for name in numbers}
        for case, numbers in rounds[0].items()
    }


def _ratios(rounds: list[dict[str, dict[str, float]]], ratios: Mapping[str, Ratio]) -> dict[str, dict[str, float]]:
    found = {}
    for name, ratio in ratios.items():
        values = sorted(_value(one, ratio.over) / _value(one, ratio.under) for one in rounds)
        found[name] = {"median": statistics.median(values), "lowest": values[0], "highest": values[-1]}
    return found


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "hardware": {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "gpu": _gpu()},
        "versions": {"python": platform.python_version(), **versions},
        "rounds": options.rounds,
        "threads": options.threads,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _show(name: str, result: Mapping[str, Any], ratios: Mapping[str, Ratio]) -> None:
    hardware, versions = result["hardware"], result["versions"]
    print(f"\n{name}: {result['date']}, {hardware['cores']} cores of {hardware['processor']}, "
          + ", ".join(f"{package} {version}" for package, version in versions.items()))  # fmt: skip
    for case, numbers in result["cases"].items():
        print(f"  {case:28}" + "  ".join(f"{number} {value:,.4g}" for number, value in numbers.items()))
    for text, values in result["ratios"].items():
        target = ratios[text].target
        aim = "" if target is None else f", aim: {'at least' if ratios[text].better == 'more' else 'at most'} {target}"
        print(f"  {text}: {values['median']:.2f}x ({values['lowest']:.2f} to {values['highest']:.2f}{aim})")


def _compare(result: Mapping[str, Any], recorded: Mapping[str, Any] | None, ratios: Mapping[str, Ratio]) -> int:
    if recorded is None:
        print("  nothing is recorded yet: `--record` writes it")
        return 0
    if result["hardware"] != recorded["hardware"]:
        print(f"  recorded on other hardware: {recorded['hardware']}")
    found = [_judge(text, ratios[text], result["ratios"][text], recorded["ratios"].get(text)) for text in ratios]
    worse = [line for line in found if line]
    print("\n".join(worse) if worse else "  no ratio is worse than recorded by more than the noise")
    return bool(worse)


def _judge(text: str, ratio: Ratio, now: Mapping[str, float], then: Mapping[str, float] | None) -> str | None:
    """What is wrong with a ratio beside the one recorded; None where nothing is."""
    noise = _spread(now) + _spread(then or now)
    if noise > TOO_NOISY:
        return f"  too noisy to tell: {text}: the rounds are {noise:.0%} apart; repeat it on a quiet machine"
    if then is None:
        return None
    change = then["median"] / now["median"] if ratio.better == "more" else now["median"] / then["median"]
    if change <= 1 + noise:
        return None
    return f"  worse than recorded: {text}: {now['median']:.2f}x instead of {then['median']:.2f}x, noise {noise:.0%}"


def _spread(values: Mapping[str, float]) -> float:
    return (values["highest"] - values["lowest"]) / values["median"]
