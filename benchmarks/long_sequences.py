"""The longest row that a device can train on, switch by switch; and on CPU, how memory grows with the length.

    python benchmarks/long_sequences.py [--shape 8b] [--at 131072]      (a GPU)
    python benchmarks/long_sequences.py --rounds 1                      (a CPU)

A Llama with random weights, rows of one document, a label at every position. Each case has one switch more than the one
before: `kept` keeps all activations and all logits, `again` computes layers again, `loss` has the logits in tiles,
`mlp` the MLPs too, `offload` moves inputs of layers to the host.

On a GPU, whole training steps (forward, backward, update) in bf16 with the optimizer's state in bf16 too (`--host` puts
it into the host's memory, at ZeRO stage 3, as the recipes do). The longest row is found by bisection between one that
ran and one that ran out of memory, to within `--close`. `MFU` is of a step with `--at` tokens, or of the longest row: 6
FLOP for each weight and token, and 6 x hidden size x layers x n^2 for causal attention, over the time and the rate of
a large matrix product in the same process. What is computed twice is not counted.

On a CPU, the most that the allocator has out in the passes, for rows of 1, 2 and 4 times `--unit` tokens in fp32:
`B/token` is its slope, `straight` how far the middle one is from the line, as a share, and `kept` are the bytes that
must be there for each token: the inputs of all layers, or, in the case `kept`, what autograd keeps of all layers.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import harness

SHAPES = {
    **gpu.SHAPES,
    "deep": {
        **gpu.LLAMA, "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 48, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 2048,
    },
}  # fmt: skip
"""By name; `deep` is for CPUs, and has the proportions of a large model."""
OFF = {"tiled_loss": False, "tiled_mlp": False, "offload_activations": False}
SWITCHES: dict[str, tuple[bool, dict[str, Any]]] = {
    "kept": (False, OFF),
    "again": (True, OFF),
    "loss": (True, {**OFF, "tiled_loss": "auto"}),
    "mlp": (True, {**OFF, "tiled_loss": "auto", "tiled_mlp": "auto"}),
    "offload": (True, {"tiled_loss": "auto", "tiled_mlp": "auto", "offload_activations": True}),
}
"""By case: whether layers are computed again, and the keys of `plugins.sequence-parallel`."""


def recipe(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of one case; its data are never read."""
    again, feature = SWITCHES[case]
    if feature["tiled_loss"] == "auto" and options.tile:
        feature = {**feature, "tiled_loss": options.tile}
    half = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    on_host = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    on_gpu = on_host if options.host else {"zero_optimization": {"stage": 2}, **half}
    return {
        "type": "sft",
        "model": {
            "config": {"model_type": "llama", **SHAPES[options.shape], "max_position_embeddings": 2**24},
            "dtype": "bf16" if gpu.device() == "cuda" else "fp32",
            "disable_activation_checkpoint": not again,
        },
        "data": {"sources": [{"type": "jsonl", "path": "unread.jsonl"}]},
        "plugins": {"sequence-parallel": feature},
        **({"optimizer": {"type": "cpu_adam" if options.host else "adamw"}, "deepspeed": on_gpu}
           if gpu.device() == "cuda" else {}),
    }  # fmt: skip


def ready(case: str, options: argparse.Namespace) -> Any:
    """A run whose model and engine are there."""
    import torch

    from ptrain import engine
    from ptrain.plan.model import UnknownTokenizer
    from ptrain.recipe.load import load_recipe
    from ptrain.run import Run
    from ptrain.setup import create_model

    run = Run(load_recipe(recipe(case, options)), Path("nowhere"))
    run.device = engine.start(gpu.device(), 0)
    if run.device.type == "cuda":
        run.device_memory = torch.cuda.get_device_properties(run.device).total_memory
    run.tokenizer = UnknownTokenizer(SHAPES[options.shape]["vocab_size"])  # type: ignore[assignment]
    create_model(run)
    run.optimizer = run.call("create_optimizer", model=run.model)
    run.engine = run.call("create_engine", model=run.model, optimizer=run.optimizer, scheduler=None)
    run.engine.train(True)
    return run


def batch(run: Any, length: int) -> dict[str, Any]:
    """A row of one document, on the device."""
    import torch

    ids = torch.arange(length, device=run.device)[None] % run.hf_config.vocab_size
    return {
        "input_ids": ids, "shift_labels": ids, "position_ids": torch.arange(length, device=run.device)[None],
        "document_ids": torch.zeros_like(ids), "document_lengths": [[length]], "rows": 1, "row_numbers": [0],
        "split": "train",
    }  # fmt: skip


def passes(run: Any, length: int) -> None:
    """A forward and a backward pass."""
    from ptrain import stages

    run.backward(stages.forward_loss(run, batch(run, length)), {"loss": length})


def step(run: Any, length: int) -> float | None:
    """Seconds of a training step; None where memory ran out."""
    import torch

    torch.cuda.synchronize()
    begin = time.perf_counter()
    try:
        passes(run, length)
        run.engine.update()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    return time.perf_counter() - begin


def longest(fits: Callable[[int], bool], begin: int, close: float) -> int:
    """The greatest length for which `fits` says yes, to within the share `close`; 0 where `begin` does not fit."""
    low, high = 0, begin
    while fits(high):
        low, high = high, 2 * high
    while low and high - low > close * low:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def on_gpu(case: str, options: argparse.Namespace) -> Mapping[str, float]:
    """The longest row, and time and memory of a step."""
    import torch

    held: list[Any] = [ready(case, options)]

    def fits(length: int) -> bool:
        found = step(held[0], length)
        if found is None:
            # What is half done is in the way: begin anew.
            held.clear()
            gc.collect()
            torch.cuda.empty_cache()
            held.append(ready(case, options))
        return found is not None

    most = longest(fits, options.begin, options.close)
    length = min(options.at, most)
    if not length:
        return {"tokens": 0}
    torch.cuda.reset_peak_memory_stats()
    times = [found for _ in range(options.steps + 1) if (found := step(held[0], length)) is not None]
    seconds = min(times[1:] or times)
    return {
        "tokens": most, "at": length, "s": seconds, "GiB": torch.cuda.max_memory_allocated() / 2**30,
        "MFU": needed(SHAPES[options.shape], length) / seconds / gpu.matrix_rate(),
    }  # fmt: skip


def needed(shape: Mapping[str, Any], length: int) -> float:
    """FLOP of a step of one document, by the formula above."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    weights = layers * (2 * hidden * (hidden + keys) + 3 * hidden * shape["intermediate_size"])
    return 6 * length * (weights + shape["vocab_size"] * hidden) + 6 * hidden * layers * length**2


def on_cpu(case: str, options: argparse.Namespace) -> Mapping[str, float]:
    """How the peak of the passes grows, and how much must."""
    run = ready(case, options)
    passes(run, options.unit)  # what is made once
    # On a busy machine what the profiler hears from several threads may be in the wrong order.
    peaks = [min(peak(lambda n=n: passes(run, n * options.unit)) for _ in range(2)) for n in (1, 2, 4)]
    slope = (peaks[2] - peaks[0]) / (3 * options.unit)
    middle = (2 * peaks[0] + peaks[2]) / 3
    must = kept(run, case, options.unit)
    return {"B/token": slope, "kept": must, "of kept": slope / must, "straight": abs(peaks[1] - middle) / middle}


def kept(run: Any, case: str, length: int) -> float:
    """Bytes that must be there for each token in the passes: see above."""
    each = saved(run, length) / length if case == "kept" else 4 * run.hf_config.hidden_size
    return len(run.model.base_model.layers) * each


def saved(run: Any, length: int) -> int:
    """Bytes that autograd keeps of a layer which is not computed again, weights left out."""
    import torch

    body, own = run.model.base_model, {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    states = torch.randn(1, length, run.hf_config.hidden_size, requires_grad=True)
    places = torch.arange(length)[None]
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    body.layers[0].gradient_checkpointing = False
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        from ptrain.model.attention import per_document

        with per_document():
            turns = body.rotary_emb(states, places)
            body.layers[0](states, position_embeddings=turns, attention_mask=None, document_lengths=[[length]])
    return sum(found.values())


def peak(work: Callable[[], None]) -> int:
    """The most bytes that PyTorch's allocator has out at a time while `work` is done, beside those before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    result: Any = found.profiler
    events = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(case: str, options: argparse.Namespace) -> Mapping[str, float]:
    """One case on what there is."""
    return (on_gpu if gpu.device() == "cuda" else on_cpu)(case, options)


def add(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--shape", choices=SHAPES, default="8b" if gpu.device() == "cuda" else "deep")
    parser.add_argument("--begin", type=int, default=8192, help="the first length that is tried on a GPU")
    parser.add_argument("--close", type=float, default=0.02, help="how near to the longest row, as a share of it")
    parser.add_argument("--at", type=int, default=131072, help="tokens of the steps that are timed")
    parser.add_argument("--steps", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--host", action="store_true", help="the optimizer's state in the host's memory")
    parser.add_argument(
        "--tile", type=int, default=0 if gpu.device() == "cuda" else 128, help="tokens whose logits are there at a time"
    )
    parser.add_argument("--unit", type=int, default=512, help="tokens of the shortest row on a CPU")


CASES: dict[str, harness.Case] = {case: partial(measure, case) for case in SWITCHES}
FIRST, *LATER = SWITCHES
RATIOS = (
    {f"longest row, {case} to {FIRST}": harness.Ratio(f"{case}.tokens", f"{FIRST}.tokens", "more") for case in LATER}
    if gpu.device() == "cuda"
    else {
        f"memory for each token, {case}, to what must be kept": harness.Ratio(
            f"{case}.B/token", f"{case}.kept", "less", 1.2
        )
        for case in ("kept", "mlp")
    }
)

if __name__ == "__main__":
    sys.exit(harness.main("long_sequences" if gpu.device() == "cuda" else "long_memory", CASES, RATIOS, add))
