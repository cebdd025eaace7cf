"""DeepSpeed: the one place that knows it.

Three of its habits are undone here, so that a step means what `ptrain.stages.step` says:
it averages gradients over the workers (the loss is multiplied by their number), it divides by its own count
of accumulation steps (switched off), and it decides on its own when a step is over
(`managed_gradient_accumulation: false` leaves that to `update`).
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ptrain.launch.hang import beat

if TYPE_CHECKING:
    from ptrain.recipe.sections import Recipe

T = TypeVar("T")


class Body(nn.Module):
    """The module that DeepSpeed wraps: its forward pass runs whatever work it is given.

    Whatever touches the model happens inside the engine's forward pass, where ZeRO-3 gathers weights, so a
    loss may call the body, the head or anything else in any order.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.work: Callable[[], Any] | None = None

    def forward(self) -> Any:
        if self.work is None:
            raise RuntimeError("the engine was called without work")
        return self.work()


class Engine:
    """Forward, backward and update of one model.

    Attributes:
        deepspeed: the DeepSpeed engine.
        stage: its ZeRO stage.
        clip: the largest gradient norm, 0 for no limit.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], clip: float
    ) -> None:
        import deepspeed

        self.clip = clip
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self._body = Body(model)
        gather_head_whole(model)
        # Plain fp32 without ZeRO is clipped here, because DeepSpeed clips there without telling the norm.
        self._plain = self.stage == 0 and not any(config.get(k, {}).get("enabled") for k in ("bf16", "fp16"))
        whole = {**config, "gradient_clipping": 0.0 if self._plain else clip}
        self.deepspeed, *_ = deepspeed.initialize(model=self._body, optimizer=optimizer, config=whole)
        if self._plain:
            # DeepSpeed would reduce inside `step`, after which the norm can't be had: `update` reduces first.
            self.deepspeed.enable_backward_allreduce = False

    @property
    def world(self) -> int:
        """The number of workers whose gradients are added."""
        return torch.distributed.get_world_size()

    def __call__(self, work: Callable[[], T]) -> T:
        """The result of `work`, run inside the engine's forward pass."""
        beat("a forward pass")
        self._body.work = work
        try:
            return self.deepspeed()
        finally:
            self._body.work = None

    def train(self, mode: bool = True) -> None:
        """Switch dropout and the like on or off."""
        self.deepspeed.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` (a scalar; summed over micro-batches and workers) to the step."""
        beat("a backward pass")
        self.deepspeed.backward(loss * self.world, scale_wrt_gas=False)

    def update(self) -> float:
        """Take the optimizer step and return the norm of the whole gradient before clipping.

        Where that is not finite, the weights are left as they are, and it is infinite.
        """
        beat("the update")
        if self._plain:
            return self._plain_update()
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    def _plain_update(self) -> float:
        if self.world > 1:
            self.deepspeed.buffered_allreduce_fallback(elements_per_buffer=500_000_000)
        # Only now: a worker gets gradients there for weights that it has not used, such as those of other experts.
        params = [p for p in self._body.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(params, self.clip or float("inf")))
        if not math.isfinite(norm):  # DeepSpeed's own optimizers leave such a step out, too
            self.deepspeed.zero_grad()
            return math.inf
        self.deepspeed.step()
        return norm


def gather_whole(module: nn.Module) -> None:
    """Have ZeRO-3 gather all weights below `module` when it is called, however often it then calls what is in it.

    To be told before there is an engine. Workers may then call what is in it unequally often.
    """
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)


def is_gathered_whole(module: nn.Module) -> bool:
    """Whether `gather_whole` was told of it."""
    return bool(getattr(module, "_z3_leaf", False))


def gather_head_whole(model: nn.Module) -> None:
    """An output layer that is made of several (one with an adapter) computes its logits in tiles, too."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is not None and any(True for _ in head.children()):
        gather_whole(head)


class Frozen:
    """A model that is asked and not trained, such as a reference: sharded under ZeRO-3, otherwise whole on each worker.

    Attributes:
        stage: the ZeRO stage of the run.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any], device: torch.device) -> None:
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        model.eval().requires_grad_(False)
        self._body = Body(model)
        self._run: Callable[[], Any] = self._body
        if self.stage == 3:
            import deepspeed

            gather_head_whole(model)
            # Offloading optimizer states is no matter of a model that has none.
            zero = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
            self._run, *_ = deepspeed.initialize(model=self._body, config={**config, "zero_optimization": zero})
        else:
            model.to(device)

    def __call__(self, work: Callable[[], T]) -> T:
        """The result of `work`, without gradients, run where weights are gathered."""
        beat("a forward pass")
        self._body.work = work
        try:
            with torch.no_grad():
                return self._run()
        finally:
            self._body.work = None


def start(device: str, local_rank: int, wait: float = 0) -> torch.device:
    """Join the process group and return this worker's device.

    Args:
        device: "cpu" or "cuda".
        local_rank: of this worker on its machine.
        wait: seconds that workers wait for each other, where that is longer than DeepSpeed's own time.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    quiet()
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    # A CPU job would compile a shared-memory kernel for half a minute; gloo does without. The name is
    # private, so its absence is no error.
    known = getattr(deepspeed.ops, "__compatible_ops__", None)
    if device == "cpu" and isinstance(known, dict):
        known["deepspeed_shm_comm"] = False
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    timeout = max(default_pg_timeout, timedelta(seconds=wait))
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False, timeout=timeout)
    return torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def quiet() -> None:
    """Silence what libraries say at every start and users can do nothing about."""
    import logging

    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("DS_LOG_LEVEL", "error")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says that it looked for others
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"deepspeed")
    # Older versions of transformers know no other name for it.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`gradient_checkpointing_enable`")


def close() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sum_over_workers(values: list[float], device: torch.device) -> list[float]:
    """Each value added over all workers, in float64."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def any_worker(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on some worker; every worker must ask."""
    return sum_over_workers([float(flag)], device)[0] > 0


def peak_memory(device: torch.device) -> float:
    """The most memory that this worker has had so far, in GiB: of its GPU, or of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the recipe's block, completed with what the recipe derives."""
    block = dict(recipe.deepspeed)
    zero = dict(block.get("zero_optimization", {}))
    # One fp32 worker has nothing to shard, and the plain path is the fastest; stage 2 is the usual choice.
    zero.setdefault("stage", 0 if world == 1 and recipe.model.dtype == "fp32" else 2)
    dtype = {"bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True}}}.get(recipe.model.dtype, {})
    for name, value in dtype.items():
        block[name] = {**block.get(name, {}), **value}
    return {
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        **block,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": 1,
    }
