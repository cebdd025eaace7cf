"""DeepSpeed's own keys, as far as a recipe may set them, as the typed blocks of the `deepspeed` section.

DeepSpeed ignores most keys that it does not know; here they are errors. What the keys do is in DeepSpeed's
documentation; a default here only says "not given".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, field_validator

from ptrain.recipe.config import Config

Flag = bool | None
Whole = int | None
Number = float | None
Dtype = Literal["fp32", "fp16", "bf16"] | None


def _describe(made: dict[str, Any]) -> None:
    for name, key in made["properties"].items():
        key.setdefault("description", f"DeepSpeed's own `{name}`: see its documentation.")


class Block(Config):
    """A block of DeepSpeed's configuration."""

    model_config = ConfigDict(json_schema_extra=_describe)

    @field_validator("*", mode="before")
    @classmethod
    def _no_auto(cls, value: Any) -> Any:
        if value == "auto":
            raise ValueError("`auto` is a word of other frameworks: leave the key out")
        return value


class OffloadParam(Block):
    """`zero_optimization.offload_param`."""

    device: Literal["none", "cpu", "nvme"] | None = None
    nvme_path: str | None = None
    buffer_count: Whole = None
    buffer_size: Whole = None
    max_in_cpu: Whole = None
    pin_memory: Flag = None


class OffloadOptimizer(Block):
    """`zero_optimization.offload_optimizer`."""

    device: Literal["none", "cpu", "nvme"] | None = None
    nvme_path: str | None = None
    buffer_count: Whole = None
    pin_memory: Flag = None
    pipeline_read: Flag = None
    pipeline_write: Flag = None
    fast_init: Flag = None
    ratio: Number = None
    super_offload: Flag = None
    cpuadam_cores_perc: Number = None


class LeafModule(Block):
    """`zero_optimization.leaf_module`."""

    classes: list[str] | None = None
    names: list[str] | None = None
    name_suffixes: list[str] | None = None


class Zero(Block):
    """`zero_optimization`."""

    aliases: ClassVar[Mapping[str, str]] = {
        short: f"stage3_{short}"
        for short in (
            "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
            "max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save",
            "module_granularity_threshold", "use_all_reduce_for_fetch_params", "allgather_sequential",
        )
    }  # fmt: skip

    stage: Literal[0, 1, 2, 3] | None = None
    contiguous_gradients: Flag = None
    reduce_scatter: Flag = None
    reduce_bucket_size: Whole = None
    use_multi_rank_bucket_allreduce: Flag = None
    allgather_partitions: Flag = None
    allgather_bucket_size: Whole = None
    overlap_comm: Flag = None
    compute_grad_norm: Flag = None
    load_from_fp32_weights: Flag = None
    elastic_checkpoint: Flag = None
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    sub_group_size: Whole = None
    cpu_offload_param: Flag = None
    cpu_offload_use_pin_memory: Flag = None
    cpu_offload: Flag = None
    stage3_prefetch_bucket_size: Whole = None
    stage3_param_persistence_threshold: Whole = None
    stage3_model_persistence_threshold: Whole = None
    stage3_max_live_parameters: Whole = None
    stage3_max_reuse_distance: Whole = None
    stage3_gather_16bit_weights_on_model_save: Flag = None
    stage3_gather_fp16_weights_on_model_save: Flag = None
    stage3_module_granularity_threshold: Whole = None
    stage3_use_all_reduce_for_fetch_params: Flag = None
    stage3_allgather_sequential: Flag = None
    ignore_unused_parameters: Flag = None
    legacy_stage1: Flag = None
    parameter_alignment: Flag = None
    zero_hpz_partition_size: Whole = None
    zero_quantized_weights: Flag = None
    zero_quantized_nontrainable_weights: Flag = None
    zero_quantized_gradients: Flag = None
    memory_efficient_linear: Flag = None
    pipeline_loading_checkpoint: Flag = None
    override_module_apply: Flag = None
    log_trace_cache_warnings: Flag = None
    enable_sanity_checks: Flag = None
    save_muon_momentum_buffer_in_memory: Flag = None
    leaf_module: LeafModule | None = None


class ActivationCheckpointing(Block):
    """`activation_checkpointing`."""

    partition_activations: Flag = None
    number_checkpoints: Whole = None
    contiguous_memory_optimization: Flag = None
    synchronize_checkpoint_boundary: Flag = None
    profile: Flag = None
    cpu_checkpointing: Flag = None


class BF16(Block):
    """`bf16`, without `enabled`."""

    immediate_grad_update: Flag = None
    check_grad_overflow: Flag = None
    bf16_master_weights_and_grads: Flag = None
    bf16_optimizer_states: Flag = None


class FP16(Block):
    """`fp16`, without `enabled`."""

    auto_cast: Flag = None
    loss_scale: Number = None
    initial_scale_power: Whole = None
    loss_scale_window: Whole = None
    hysteresis: Whole = None
    consecutive_hysteresis: Flag = None
    min_loss_scale: Whole = None
    fp16_master_weights_and_grads: Flag = None


class TorchAutocast(Block):
    """`torch_autocast`."""

    enabled: Flag = None
    dtype: str | None = None
    lower_precision_safe_modules: list[str] | None = None


class DataTypes(Block):
    """`data_types`."""

    grad_accum_dtype: Dtype = None
    param_dtype: Dtype = None
    buffer_dtype: Dtype = None
    keep_in_fp32_modules: list[str] | None = None


class CommsLogger(Block):
    """`comms_logger`."""

    enabled: Flag = None
    prof_all: Flag = None
    prof_ops: list[str] | None = None
    verbose: Flag = None
    debug: Flag = None


class FlopsProfiler(Block):
    """`flops_profiler`."""

    enabled: Flag = None
    recompute_fwd_factor: Number = None
    profile_step: Whole = None
    module_depth: Whole = None
    top_modules: Whole = None
    detailed: Flag = None
    output_file: str | None = None


class Monitor(Block):
    """`tensorboard` and `csv_monitor`."""

    enabled: Flag = None
    output_path: str | None = None
    job_name: str | None = None


class Comet(Block):
    """`comet`."""

    enabled: Flag = None
    samples_log_interval: Whole = None
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: Flag = None
    mode: str | None = None


class ThroughputTimer(Block):
    """`timers.throughput`."""

    enabled: Flag = None
    synchronized: Flag = None


class Timers(Block):
    """`timers`."""

    throughput: ThroughputTimer | None = None


class Aio(Block):
    """`aio`."""

    block_size: Whole = None
    queue_depth: Whole = None
    intra_op_parallelism: Whole = None
    single_submit: Flag = None
    overlap_events: Flag = None
    use_gds: Flag = None


class DeepSpeedConfig(Block):
    """The `deepspeed` section."""

    zero_optimization: Zero | None = None
    activation_checkpointing: ActivationCheckpointing | None = None
    bf16: BF16 | None = None
    fp16: FP16 | None = None
    torch_autocast: TorchAutocast | None = None
    data_types: DataTypes | None = None
    communication_data_type: Dtype = None
    seq_parallel_communication_data_type: Dtype = None
    prescale_gradients: Flag = None
    gradient_predivide_factor: Number = None
    disable_allgather: Flag = None
    steps_per_print: Whole = None
    wall_clock_breakdown: Flag = None
    memory_breakdown: Flag = None
    dump_state: Flag = None
    disable_python_gc: Flag = None
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    comms_logger: CommsLogger | None = None
    flops_profiler: FlopsProfiler | None = None
    tensorboard: Monitor | None = None
    csv_monitor: Monitor | None = None
    comet: Comet | None = None
    timers: Timers | None = None
    aio: Aio | None = None
