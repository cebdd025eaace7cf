"""The `deepspeed` section, and its table of keys against the DeepSpeed that is installed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

from ptrain.recipe import deepspeed_keys as keys
from ptrain.recipe.config import Config
from ptrain.recipe.deepspeed import DERIVED, REFUSED
from ptrain.recipe.load import Loaded

MINIMAL = "type: tiny\nmicro_batch_size: 2\nmodel: {}\ndata: {sources: [a]}\n"
Problems = Callable[..., list[str]]

SAME = {
    "zero.config:DeepSpeedZeroConfig": ("zero_optimization", keys.Zero),
    "zero.offload_config:DeepSpeedZeroOffloadParamConfig": ("", keys.OffloadParam),
    "zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig": ("", keys.OffloadOptimizer),
    "zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig": ("", keys.LeafModule),
    "precision_config:DeepSpeedBF16Config": ("bf16", keys.BF16),
    "precision_config:DeepSpeedFP16Config": ("fp16", keys.FP16),
    "..comm.config:CommsLoggerConfig": ("", keys.CommsLogger),
    "..monitor.config:TensorBoardConfig": ("", keys.Monitor),
    "..monitor.config:CSVConfig": ("", keys.Monitor),
    "..monitor.config:CometConfig": ("", keys.Comet),
    "..utils.config:DeepSpeedThroughputTimerConfig": ("", keys.ThroughputTimer),
}
"""Classes of DeepSpeed, and those of ours that must have the same keys."""


@pytest.fixture(scope="module")
def deepspeed() -> ModuleType:
    """DeepSpeed itself; it says much while it is imported."""
    return pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def theirs(name: str) -> type[BaseModel]:
    module, _, cls = name.partition(":")
    return getattr(
        importlib.import_module(f"deepspeed.runtime.{module}".replace("runtime....", "").replace("runtime...", "")),
        cls,
    )


@pytest.mark.parametrize("name", SAME)
def test_blocks_have_the_keys_of_deepspeed(deepspeed: ModuleType, name: str) -> None:
    block, ours = SAME[name]
    known = {info.alias or key for key, info in theirs(name).model_fields.items()}
    refused = {key.removeprefix(f"{block}.") for key in (*DERIVED, *REFUSED) if block and key.startswith(f"{block}.")}
    assert set(ours.model_fields) == known - refused
    short = {key for key, info in theirs(name).model_fields.items() if info.alias}
    assert set(ours.aliases) == short


def constants(deepspeed: ModuleType, path: str, prefix: str) -> set[str]:
    """The words that the constants of a file of DeepSpeed stand for."""
    text = (Path(str(deepspeed.__file__)).parent / path).read_text(encoding="utf-8")
    return set(re.findall(rf"^{prefix}\w* = ['\"](\w+)['\"]", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("path", "prefix", "ours"),
    [
        ("runtime/activation_checkpointing/config.py", "ACT_CHKPT_", keys.ActivationCheckpointing),
        ("runtime/swap_tensor/constants.py", "AIO_", keys.Aio),
        ("profiling/constants.py", "FLOPS_PROFILER_", keys.FlopsProfiler),
        ("runtime/constants.py", "TORCH_AUTOCAST_", keys.TorchAutocast),
    ],
)
def test_blocks_that_deepspeed_reads_by_hand(deepspeed: ModuleType, path: str, prefix: str, ours: type[Config]) -> None:
    assert set(ours.model_fields) == constants(deepspeed, path, prefix)


def test_top_level_keys_are_those_that_deepspeed_reads(deepspeed: ModuleType) -> None:
    """Every key that DeepSpeed's own configuration asks for is allowed, derived or refused here, and no other."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()

    class Spy(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return _Keys(self)

        def __copy__(self) -> Spy:
            return self

    class _Keys:
        def __init__(self, spied: Spy) -> None:
            self.spied = spied

        def __contains__(self, key: object) -> bool:
            return key in self.spied

    DeepSpeedConfig(Spy(train_batch_size=1))
    ours = set(keys.DeepSpeedConfig.model_fields) | {name for name in (*DERIVED, *REFUSED) if "." not in name}
    monitors = {"tensorboard", "csv_monitor", "comet", "wandb"}  # read by another class, from the whole
    internal = {"vocabulary_size", "checkpoint_tag_validation"}
    assert asked - ours - internal == set()
    assert set(keys.DeepSpeedConfig.model_fields) - asked - monitors == set()
    assert set(DERIVED) & set(REFUSED) == set()


def test_data_types(deepspeed: ModuleType) -> None:
    from deepspeed.runtime import constants as named

    known = {named.GRAD_ACCUM_DTYPE, named.PARAM_DTYPE, named.BUFFER_DTYPE, named.KEEP_IN_FP32_MODULES}
    assert set(keys.DataTypes.model_fields) == known


@pytest.mark.torch_free
def test_values_are_read_like_all_others(load: Callable[..., Loaded]) -> None:
    text = f"""{MINIMAL}deepspeed:
  zero_optimization:
    stage: 3
    reduce_bucket_size: 5e8
    stage3_prefetch_bucket_size: "50M"
    max_live_parameters: 1_000
    overlap_comm: true
  steps_per_print: "10"
  fp16: {{loss_scale: 128}}
  x-note: 1
"""
    assert load(text).recipe.deepspeed == {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 500_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1000,
            "overlap_comm": True,
        },
        "steps_per_print": 10,
        "fp16": {"loss_scale": 128.0},
    }


@pytest.mark.torch_free
@pytest.mark.parametrize(
    ("block", "found"),
    [
        (
            "{zero_optimisation: {stage: 1}}",
            "5:13 `deepspeed` has no key `zero_optimisation` |  | write `zero_optimization`",
        ),
        ("{zero_optimization: {stge: 1}}", "5:33 `deepspeed.zero_optimization` has no key `stge` |  | write `stage`"),
        (
            "{zero_optimization: {offload_optimizer: {devise: cpu}}}",
            "5:53 `deepspeed.zero_optimization.offload_optimizer` has no key `devise` |  | write `device`",
        ),
        (
            "{zero_optimization: {stage: 4}}",
            "5:40 `deepspeed.zero_optimization.stage` is 4 | one of `0`, `1`, `2`, `3` | ",
        ),
        (
            '{zero_optimization: {reduce_bucket_size: "8x"}}',
            "5:53 `deepspeed.zero_optimization.reduce_bucket_size`: a whole number is expected (200k, 1e-5, 2_000, 128ki, 10%, 2^20 are some too), not `8x` |  | ",
        ),
        (
            "{zero_optimization: {reduce_bucket_size: auto}}",
            "5:53 `deepspeed.zero_optimization.reduce_bucket_size`: `auto` is a word of other frameworks: leave the key out |  | ",
        ),
        ("{zero_optimization: 2}", "5:32 `deepspeed.zero_optimization` is 2 | a section | "),
        (
            "{train_micro_batch_size_per_gpu: 4}",
            "5:13 `deepspeed.train_micro_batch_size_per_gpu` follows from the recipe's `micro_batch_size` (r.yaml:2:1) | one place that says it | remove it",
        ),
        (
            "{gradient_clipping: 1}",
            "5:13 `deepspeed.gradient_clipping` follows from the recipe's `gradient_clipping` | one place that says it | remove it and set `gradient_clipping`",
        ),
        (
            "{bf16: {enabled: true}}",
            "5:20 `deepspeed.bf16.enabled` follows from the recipe's `model.dtype` | one place that says it | remove it and set `model.dtype`",
        ),
        (
            "{optimizer: {type: Adam}}",
            "5:13 `deepspeed.optimizer` follows from the recipe's `optimizer` | one place that says it | remove it and set `optimizer`",
        ),
        (
            "{elasticity: {}}",
            "5:13 `deepspeed.elasticity` can't be set in a recipe: DeepSpeed no longer has it |  | leave it out",
        ),
        ("ds.json", '5:12 `deepspeed` is "ds.json" | keys with values | '),
        ("{lr: 1}", "5:13 `deepspeed` has no key `lr` |  | it belongs in `optimizer`"),
    ],
)
def test_problems(problems: Problems, tmp_path: Path, block: str, found: str) -> None:
    assert [one.replace(f"{tmp_path}/", "") for one in problems(f"{MINIMAL}deepspeed: {block}\n")] == [found]


@pytest.mark.torch_free
@pytest.mark.parametrize("name", [*DERIVED, *REFUSED])
def test_every_refused_key_is_refused(problems: Problems, name: str) -> None:
    outer, _, inner = name.partition(".")
    block = f"{{{outer}: {{{inner}: true}}}}" if inner else f"{{{outer}: true}}"
    (found,) = problems(f"{MINIMAL}deepspeed: {block}\n")
    assert f"`deepspeed.{name}`" in found
    assert (f"`{DERIVED[name]}`" if name in DERIVED else REFUSED[name]) in found
