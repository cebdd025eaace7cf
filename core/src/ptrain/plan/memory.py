"""The memory of one worker: what DeepSpeed keeps, and what the passes through the model take beside it."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ptrain.plan.states import MASTER, Sharding, sharding, state_bytes, states

if TYPE_CHECKING:
    from ptrain.plan.activations import Peak
    from ptrain.plan.devices import Device
    from ptrain.plan.model import Parameters
    from ptrain.plan.rows import Batch
    from ptrain.run import Run

ROOM = 0.9
"""The share of a device that may be needed before it is doubtful whether it is enough."""

FOLLOWED = 4
"""Tiles of logits; twice as many are followed at the most, as each further one adds the same."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker.

    Attributes:
        dtype: that the model computes in.
        stage: of ZeRO.
        recompute: whether activations are computed again in the backward pass.
        samples, length: of the largest micro-batch, with padding.
        columns: positions of each row that are this worker's, where workers share rows; otherwise all.
        weights, gradients, optimizer: with the optimizer's fp32 weights.
        activations: of the body of the model, at their peak; None where they can't be found out.
        kept: those of them that are there between the forward and the backward pass, while logits are; likewise.
        logits: of log-probabilities and their gradient; likewise.
        growing: of activations and gradients together, at their peak, in a step in which gradients begin at nothing;
            None where they are there all the time.
        buffers: of DeepSpeed in the backward pass.
        update: of DeepSpeed in the optimizer step, in which there are no activations.
        host: of what is offloaded to the memory of the machine.
    """

    dtype: str
    stage: int
    recompute: bool
    samples: int
    length: int
    columns: int
    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    kept: int | None
    logits: int | None
    growing: int | None
    buffers: int
    update: int
    host: int

    @property
    def peak(self) -> int:
        """The most at a time, in the passes or in the optimizer step."""
        passes = max(self.activations or 0, (self.kept or 0) + (self.logits or 0))
        passes = max(passes, self.growing) if self.growing is not None else passes + self.gradients
        return self.weights + self.optimizer + max(passes + self.buffers, self.gradients + self.update)

    def share(self, device: Device, workers: int) -> float:
        """What is needed as a share of what the device has."""
        if device.kind == "cpu":
            return (self.peak + self.host) * workers / device.bytes
        return self.peak / device.bytes


@dataclass(frozen=True)
class Choice:
    """What one change to the recipe would give."""

    name: str
    memory: Memory


class Memories:
    """The memory of a run and of what else could be chosen for it.

    Args:
        run: with a model on the device `meta`.
        unknown: gets a line where the passes through the model can't be followed.
    """

    def __init__(self, run: Run, device: Device, parameters: Parameters, unknown: list[str]) -> None:
        from ptrain.engine import deepspeed_config
        from ptrain.plan.model import make_optimizer

        block = deepspeed_config(run.recipe, run.world)
        self._run, self._device, self._parameters, self._unknown = run, device, parameters, unknown
        self._how = sharding(block, run.recipe.model.dtype, run.world, several=run.accumulation > 1)
        if device.kind == "cpu":
            # What is not written to takes no memory there.
            self._how = replace(self._how, bucket=min(self._how.bucket, parameters.trainable))
        self._state_bytes = state_bytes(lambda: make_optimizer(run, run.model, unknown), unknown)
        disabled = getattr(run.recipe.model, "disable_activation_checkpoint", None)
        self._recompute = device.kind != "cpu" if disabled is None else not disabled
        if (block.get("torch_autocast") or {}).get("enabled"):
            unknown.append("activations under `torch_autocast`: they are given as without it, which is more")

    def of(self, batch: Batch, *, stage: int | None = None, recompute: bool | None = None) -> Memory:
        """What a worker needs; without further arguments as the recipe says."""
        how = self._how if stage is None else replace(self._how, stage=stage)
        again = self._recompute if recompute is None else recompute
        kept = asdict(states(self._parameters, how, self._state_bytes))
        passes = self._passes(batch, how, again)
        passes["host"] += kept.pop("host")
        return Memory(
            dtype=self._run.recipe.model.dtype, stage=how.stage, recompute=again, samples=batch.samples,
            length=batch.length, **kept, **passes,
        )  # fmt: skip

    def _passes(self, batch: Batch, how: Sharding, recompute: bool) -> dict[str, Any]:
        samples, columns = self._batch(batch.samples, batch.length)["input_ids"].shape
        body = self._body(batch.samples, batch.length, recompute)
        if body is None:
            return {"columns": columns, "activations": None, "kept": None, "logits": None, "growing": None, "host": 0}
        growing = None
        if how.stage < 2 and not how.several:
            growing = self._body(batch.samples, batch.length, recompute, gradients=True)
        return {
            "columns": columns, "activations": body.device, "kept": body.kept, "host": body.host,
            "logits": self._logits(min(batch.labels, samples * columns)),
            "growing": growing.device if growing else None,
        }  # fmt: skip

    def others(self, batch: Batch, one: Batch) -> list[Choice]:
        """What other choices would need.

        Args:
            one: the largest micro-batch of one sample.
        """
        offloads = self._how.optimizer_on_host or self._how.weights_on_host
        first = 1 if offloads or self._run.recipe.model.dtype == "fp16" else 0
        found = [Choice(f"ZeRO {stage}", self.of(batch, stage=stage)) for stage in range(first, 4)]
        found = [choice for choice in found if choice.memory.stage != self._how.stage]
        changed = "kept" if self._recompute else "computed again"
        if self._body(batch.samples, batch.length, self._recompute) is not None:
            found.append(Choice(f"activations {changed}", self.of(batch, recompute=not self._recompute)))
            if batch.samples > 1:
                found.append(Choice("micro_batch_size 1", self.of(one)))
            if batch.samples > 1 or not self._recompute:
                found.append(
                    Choice("ZeRO 3, computed again, micro_batch_size 1", self.of(one, stage=3, recompute=True))
                )
        return found

    def longest(self, samples: int, start: int) -> int | None:
        """Tokens of the longest rows of which `samples` at a time fit; None where it can't be found out."""
        from ptrain.plan.longest import longest
        from ptrain.plan.rows import Batch

        def share(length: int) -> float:
            return self.of(Batch(samples, length, samples * length)).share(self._device, self._run.world)

        step = self._run.recipe.data.div_length * self._run.shards
        return None if self._body(samples, step, self._recompute) is None else longest(share, step, start, ROOM)

    def resumable_bytes(self) -> int:
        """A checkpoint to resume from: weights in fp32 and the optimizer's state, of what is trained."""
        shapes = [shape for group in self._parameters.trained for shape in group]
        return self._parameters.trainable * MASTER + self._state_bytes(shapes) + self._parameters.saved_buffers

    def export_bytes(self) -> int:
        """An export in the dtype of the model: all weights, or those of the adapter where it has one."""
        from ptrain.model.adapters import adapter_of

        sizes = self._parameters
        count = sizes.total if adapter_of(self._run.model) is None else sizes.trainable
        return count * self._how.weight + sizes.saved_buffers

    @functools.lru_cache  # noqa: B019 - lives as long as this plan
    def _batch(self, samples: int, length: int) -> dict[str, Any]:
        from ptrain.plan.batches import blank_batch

        return blank_batch(self._run, samples, length, self._unknown)

    @functools.lru_cache  # noqa: B019 - lives as long as this plan
    def _body(self, samples: int, length: int, recompute: bool, gradients: bool = False) -> Peak | None:
        from ptrain.plan.activations import body

        model, batch = self._run.model, self._batch(samples, length)
        forward = functools.partial(self._run.call, "forward", model=model, batch=batch)
        try:
            return body(model, forward, recompute=recompute, gradients=gradients)
        except Exception as error:  # whatever code of a model raises where there are no values
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            line = (
                f"activations and logits: {type(self._run.model).__name__} can't be followed without values ({reason})"
            )
            if line not in self._unknown:
                self._unknown.append(line)
            return None

    def _logits(self, labels: int) -> int:
        from ptrain.model.logprobs import tile_rows
        from ptrain.plan.activations import logits

        if self._run.model.get_output_embeddings() is None:
            return 0  # of embeddings, say
        rows = tile_rows(self._run.hf_config.get_text_config().vocab_size, self._run.loss_tile)
        few, more = FOLLOWED * rows, 2 * FOLLOWED * rows
        if labels <= more:
            return logits(self._run.model, labels, rows)
        one, other = logits(self._run.model, few, rows), logits(self._run.model, more, rows)
        return other + (other - one) * (labels - more) // (more - few)
