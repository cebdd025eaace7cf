"""What DeepSpeed keeps on a worker, by ZeRO stage: weights, gradients, optimizer state, buffers.

At stage 0 a worker has all of it; stage 1 shards the optimizer's state with its fp32 weights, stage 2 the gradients
too, stage 3 the weights of the model as well. The rules are those of DeepSpeed 0.19, and tests measure them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ptrain.plan.model import Parameters

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER = 4
"""Bytes of an fp32 weight."""
BUCKET, LIVE, PERSISTENT, SUB_GROUP = 500_000_000, 1_000_000_000, 100_000, 1_000_000_000
"""DeepSpeed's defaults, in elements."""


@dataclass(frozen=True)
class Sharding:
    """How DeepSpeed divides what a worker keeps.

    Attributes:
        stage: of ZeRO.
        workers: that share.
        weight, gradient: bytes of one.
        optimizer_on_host, weights_on_host: what is offloaded to the CPU.
        bucket: elements that are reduced at a time; all buckets together.
        live: elements of weights that stage 3 may have gathered at a time.
        persistent: parameters with fewer elements than this are never sharded at stage 3.
        sub_group: elements that stage 3 updates at a time.
        several: whether a step has several micro-batches.
    """

    stage: int
    workers: int
    weight: int
    gradient: int
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    bucket: int = BUCKET
    live: int = LIVE
    persistent: int = PERSISTENT
    sub_group: int = SUB_GROUP
    several: bool = False

    def at(self, stage: int) -> Sharding:
        """The same at another stage."""
        return replace(self, stage=stage)


@dataclass(frozen=True)
class States:
    """Bytes on a worker, whatever the micro-batch.

    Attributes:
        weights, gradients, optimizer: what is there all the time, or from the first backward pass on.
        buffers: what DeepSpeed needs beside them in a backward pass.
        update: what it needs beside them in an optimizer step.
        host: in the memory of the machine, of what is offloaded.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    update: int
    host: int = 0


StateBytes = Callable[[Sequence[tuple[int, ...]]], int]
"""Bytes of the optimizer's state for fp32 parameters of some shapes."""


def sharding(block: Mapping[str, Any], dtype: str, workers: int, *, several: bool) -> Sharding:
    """What a completed DeepSpeed configuration says."""
    zero: Mapping[str, Any] = block["zero_optimization"]
    stage = int(zero["stage"])
    accumulated = (block.get("data_types") or {}).get("grad_accum_dtype") or dtype
    overlap = zero.get("overlap_comm")
    twice = 2 if stage in (1, 2) and overlap else 1

    def offloaded(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    def given(name: str, default: int) -> int:
        return int(next((zero[key] for key in (name, f"stage3_{name}") if zero.get(key) is not None), default))

    return Sharding(
        stage, workers, BYTES[dtype], BYTES[accumulated], offloaded("offload_optimizer"), offloaded("offload_param"),
        twice * given("reduce_bucket_size", BUCKET), given("max_live_parameters", LIVE),
        given("param_persistence_threshold", PERSISTENT), given("sub_group_size", SUB_GROUP), several,
    )  # fmt: skip


def states(sizes: Parameters, how: Sharding, state_bytes: StateBytes) -> States:
    """What a worker keeps."""
    return (_whole, _flat, _flat, _sharded)[how.stage](sizes, how, state_bytes)


def _whole(sizes: Parameters, how: Sharding, state_bytes: StateBytes) -> States:
    """Stage 0: each worker has everything; in 16 bit an fp32 copy beside it, whose gradients are there in a step."""
    shapes = [shape for group in sizes.trained for shape in group]
    half = how.weight < MASTER
    return States(
        weights=sizes.total * how.weight + sizes.buffers,
        gradients=sizes.trainable * how.weight,
        optimizer=state_bytes(shapes) + (MASTER * sizes.trainable if half else 0),
        buffers=0,
        # Gradients are added over the workers in copies, then, in 16 bit, updated with in fp32.
        update=max(
            min(BUCKET, sizes.trainable) * how.weight if how.workers > 1 else 0,
            MASTER * sizes.trainable if half else 0,
        ),
    )


def _flat(sizes: Parameters, how: Sharding, state_bytes: StateBytes) -> States:
    """Stages 1 and 2: the fp32 weights of a group are one flat tensor, of which each worker has its share."""
    shares = [_share(sum(group), how.workers) for group in sizes.sizes]
    share, largest = sum(shares), max(shares)
    masters = MASTER * share + state_bytes([(one,) for one in shares])
    sharded = how.stage == 2
    gradients = share * how.gradient if sharded else sizes.trainable * how.gradient
    # Stage 2 collects the gradients of a micro-batch beside those of the earlier ones, and adds them at its end.
    second = gradients if sharded and how.several and how.gradient == how.weight else 0
    found = States(
        weights=(sum(_aligned(sum(group), how.workers) for group in sizes.sizes) + sum(sizes.frozen)) * how.weight
        + sizes.buffers,
        gradients=gradients,
        optimizer=masters,
        buffers=how.bucket * how.weight + second,
        # Stage 1 collects a worker's share of the gradients only now, and fp32 copies it.
        update=largest * _flattened(how) + (share * how.gradient if not sharded or how.weight == MASTER else 0),
    )
    return _on_host(found, sizes, how, share) if how.optimizer_on_host else found


def _on_host(found: States, sizes: Parameters, how: Sharding, share: int) -> States:
    """With the optimizer on the CPU: its state, the fp32 gradients and copies to and from them are there."""
    largest = max(size for group in sizes.sizes for size in group)
    # In 16 bit: the weights on their way back, and the gradients on their way there.
    ways = share * (how.weight + how.gradient) + largest * how.weight
    return replace(
        found, gradients=0 if how.stage == 2 else found.gradients, optimizer=0,
        buffers=how.bucket * how.weight + largest * how.weight, update=0,
        host=found.optimizer + MASTER * share + ways,
    )  # fmt: skip


def _sharded(sizes: Parameters, how: Sharding, state_bytes: StateBytes) -> States:
    """Stage 3: each worker has its share of every parameter; small ones are gathered once, others for each layer."""
    trained = [size for group in sizes.sizes for size in group]
    everything = [*trained, *sizes.frozen]
    shares = [sum(-(-size // how.workers) for size in group) for group in sizes.sizes]
    share, several = sum(shares), how.workers > 1
    weights = sum(-(-size // how.workers) for size in everything) * how.weight
    # What one worker gathers is what it has.
    never = sum(size for size in everything if size < how.persistent) * how.weight if several else 0
    gathered = min(sum(everything), max(how.live, max(everything))) * how.weight if several else 0
    optimizer = state_bytes([(one,) for one in shares]) + MASTER * share
    updated = min(how.sub_group, max(shares)) * _flattened(how)
    found = States(
        weights=weights + never + sizes.buffers,
        gradients=share * how.gradient,
        optimizer=optimizer,
        buffers=how.bucket * how.weight + gathered,
        update=updated + how.bucket * how.weight,
    )
    if how.optimizer_on_host:
        there = optimizer + share * (MASTER + how.gradient)
        found = replace(found, gradients=0, optimizer=0, update=how.bucket * how.weight, host=there)
    if how.weights_on_host:
        found = replace(found, weights=never + sizes.buffers, host=found.host + weights)
    return found


def _flattened(how: Sharding) -> int:
    """Bytes of a gradient in an update: its copy in one flat tensor, and that in fp32 where it is not yet."""
    return MASTER + (how.gradient if how.gradient < MASTER else 0)


def _aligned(elements: int, workers: int) -> int:
    """Elements of a flat group, of which every worker has an equal and even share."""
    return math.ceil(elements / (2 * workers)) * 2 * workers


def _share(elements: int, workers: int) -> int:
    return _aligned(elements, workers) // workers


def state_bytes(make: Callable[[], torch.optim.Optimizer], unknown: list[str]) -> StateBytes:
    """A function that gives the bytes of an optimizer's state, by letting it take a step on the device `meta`.

    Args:
        make: makes the optimizer of the run anew, over parameters on `meta`.
        unknown: gets a line where it can't take one, and is taken to keep two numbers for each it trains.
    """

    def assumed(shapes: Sequence[tuple[int, ...]]) -> int:
        return sum(2 * MASTER * math.prod(shape) for shape in shapes)

    try:
        _stepped(make(), [(2,)])
    except Exception as error:  # whatever code of others raises where there are no values
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        unknown.append(f"what the optimizer keeps, here taken to be two fp32 numbers for each that it trains: {reason}")
        return assumed
    return lambda shapes: _stepped(make(), shapes)


def _stepped(optimizer: torch.optim.Optimizer, shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes of the state after a step on fp32 parameters of these shapes."""
    import torch

    (group, *_) = optimizer.param_groups
    group["params"] = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer.param_groups[:] = [group]
    for parameter in group["params"]:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if torch.is_tensor(value))
