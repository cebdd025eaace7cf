"""The sections that core knows: the keys that every part of a kind shares, and the top-level keys.

A part's own `Config` extends the one of its kind. Defaults of a section's `type` come from the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, WithJsonSchema, field_validator, model_validator

from ptrain.recipe.config import Config

DTYPES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "bf16": "bf16", "bfloat16": "bf16",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
}  # fmt: skip
"""Every spelling of a dtype, but for case and `torch.`."""
SPELT_DTYPES = [*DTYPES, *(f"torch.{name}" for name in DTYPES)]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class PartConfig(Config):
    """What the section of every part has."""

    type: str = ""
    """Which part: a name that an installed package offers, or `distribution:name`."""


class ModelConfig(PartConfig):
    """The keys that every model part has."""

    name_or_path: str = ""
    """A name on the Hugging Face hub, or a local folder."""
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], WithJsonSchema({"enum": SPELT_DTYPES})] = "bf16"
    """The dtype that the model computes in; `float32`, `torch.bfloat16`, `half`, ... are understood too."""
    compile: bool = False
    """Have `torch.compile` make kernels of the layers: fewer operations on a GPU, at the price of a minute or more
    before the first step. Results agree to rounding. Not with ZeRO stage 3."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _read_dtype(cls, value: Any) -> Any:
        return DTYPES.get(value.lower().removeprefix("torch."), value) if isinstance(value, str) else value


class TokenizerConfig(PartConfig):
    """The keys that every tokenizer part has."""

    name_or_path: str = ""
    """A name on the hub or a local folder; the model's where it is not given."""
    chat_template: str | None = None
    """A template: one of ptrain's by name (`chatml`), or the path of a `.jinja` file."""


class OptimizerConfig(PartConfig):
    """The keys that every optimizer part has."""

    aliases: ClassVar[Mapping[str, str]] = {"lr": "learning_rate"}

    learning_rate: Annotated[float, Field(ge=0)] = 5e-4
    """The peak learning rate; `lr` is the same key."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay; biases and the weights of norms are left out."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""


class SchedulerConfig(PartConfig):
    """The keys that every scheduler part has."""


class SourceConfig(PartConfig):
    """The keys that every data source has."""

    aliases: ClassVar[Mapping[str, str]] = {"weight": "sample_ratio"}

    split: str = ""
    """Which split to read; by default `train` under `sources` and `eval` under `eval_sources`."""
    sample_ratio: Annotated[float, Field(gt=0)] | None = None
    """How much of the source an epoch holds; `weight` is the same key. 0.5 draws half of the rows with `sample_seed`,
    2 holds each row twice."""
    sample_count: Positive | None = None
    """Take this many rows, drawn with `sample_seed`, and repeated where there are fewer; not together with
    `sample_ratio`."""
    sample_seed: Count = 42
    """Seed of that draw."""
    process: bool = True
    """False: the rows already hold `input_ids` and `labels`."""

    @model_validator(mode="after")
    def _one_sample(self) -> SourceConfig:
        if self.sample_ratio is not None and self.sample_count is not None:
            raise ValueError("`sample_ratio` and `sample_count` exclude each other")
        return self


class CheckpointConfig(PartConfig):
    """The keys that every form of checkpoint has."""

    output_dir: Path | None = None
    """Where the checkpoints go; by default a folder of the run directory."""
    enabled: bool = True
    """False: this entry does nothing."""
    auto_resume: bool = False
    """Go on from the latest checkpoint in `output_dir`, if there is one; for one entry at most."""
    save_every_n_steps: Count = 0
    """Save each time that this many optimizer steps are done; 0 is off."""
    save_every_n_epochs: Count = 0
    """Save each time that this many epochs are done; 0 is off."""
    save_end_of_training: bool = False
    """Save when training is done."""
    keep_last: Positive | None = None
    """Keep this many of the newest checkpoints; the last good one is never deleted. By default all."""

    @field_validator("output_dir")
    @classmethod
    def _at_home(cls, value: Path | None) -> Path | None:
        return value.expanduser() if value is not None else None


class TrackerConfig(PartConfig):
    """The keys that every tracker has."""


class EvaluatorConfig(PartConfig):
    """The keys that every evaluator has."""

    name: str | None = None
    """What its metrics begin with: `name: short` records `eval/short/exact_match`; for several evaluators of a type."""


class DataConfig(PartConfig):
    """The `data` section, as far as all trainers share it."""

    sources: list[SerializeAsAny[SourceConfig]] = Field(min_length=1)
    """Where the training rows come from: names, or sections with a `type`."""
    eval_sources: list[SerializeAsAny[SourceConfig]] = []
    """Where the evaluation rows come from."""
    train_eval_split: tuple[float, float] = (1.0, 0.0)
    """How the rows of `sources` are divided, e.g. `[0.9, 0.1]`; made before packing."""
    max_length: Positive = 8192
    """The longest sequence, in tokens."""
    div_length: Positive = 8
    """Rows of a micro-batch are padded to the next multiple of this."""
    pad_to: Literal["div_length", "max_length"] = "div_length"
    """What rows are padded to: the longest of the micro-batch, or always `max_length`."""
    num_proc: Positive = 1
    """Processes that prepare the data, where it is enough for them to save time; the result does not depend on it."""
    dl_num_workers: Count = 0
    """Threads that make batches ahead of training and evaluation; 0 makes each when it is needed."""
    seed: Count = 42
    """Seed of the split, of packing and of the order of the rows."""
    cache_dir: Path = Path("~/.cache/ptrain/data")
    """Where prepared data is kept; `~` is the home directory."""
    fail_on_missing_cache: bool = False
    """Stop where the prepared data is not in the cache yet, instead of preparing it."""

    @property
    def longest_row(self) -> int:
        """The most tokens that a prepared row may have."""
        return self.max_length

    @field_validator("train_eval_split")
    @classmethod
    def _whole(cls, shares: tuple[float, float]) -> tuple[float, float]:
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
            raise ValueError(f"two shares that add up to 1 are expected, not {list(shares)}")
        return shares


class LoggerConfig(Config):
    """The `logger` section."""

    output_dir: Path | None = None
    """Where each worker's log file goes; by default `logs` in the run directory."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "WARNING"
    """The lowest level that is shown of the messages of libraries."""
    print_output_ranks: Literal["*"] | list[Count] = [0]
    """Workers whose messages are shown: a list of ranks, or "*"."""
    file_output_ranks: Literal["*"] | list[Count] = "*"
    """Workers that write a log file: a list of ranks, or "*"."""


class WandbConfig(Config):
    """The `wandb` section."""

    enable: bool = False
    """Send metrics to Weights & Biases (needs `pip install wandb`)."""
    entity: str | None = None
    """The user or team."""
    project: str = "ptrain"
    """The project."""
    name: str | None = None
    """The name of the run."""


class CoreConfig(Config):
    """The top-level keys that core owns and that are no sections."""

    code: Path | None = None
    """A Python file that is the top layer of plugins; runs only with `--allow-code`. Relative to the recipe."""
    output_dir: Path | None = None
    """The run directory; by default `runs/<name of the recipe>/<time>`."""
    seed: int = 42
    """Seed of everything that is drawn during training."""
    epochs: Annotated[float, Field(ge=0)] = 1
    """How often the training data is gone through."""
    train_iters: Count = 0
    """The number of optimizer steps, instead of `epochs`; 0 goes by `epochs`."""
    micro_batch_size: Positive = 1
    """Samples that one worker computes at a time."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches of each worker in one optimizer step."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """The largest norm of the whole gradient; 0 is off."""
    eval_interval: Count = 0
    """Evaluate each time that this many optimizer steps are done; 0 evaluates at the end alone."""
    eval_at_start: bool = False
    """Evaluate before the first step too."""
    eval_micro_batch_size: Positive | None = None
    """Samples that one worker evaluates at a time; by default `micro_batch_size`."""
    eval_log_iter_interval: Positive = 1
    """Record every n-th evaluation; those at the start and at the end always are."""
    loss_log_interval: Count = 1
    """Print a line each time that this many optimizer steps are done; 0 prints none."""
    train_log_iter_interval: Literal[0, 1] = 1
    """0: no line per step at all (the bar stays)."""
    train_log_metrics_path: Path | None = None
    """Where the metrics of each step go as JSON lines; by default `metrics.jsonl` in the run directory."""
    min_iterations: Count = 0
    """Repeat the training data until it lasts for this many optimizer steps."""
    exit_iteration: Count = 0
    """Stop (and save) after this optimizer step; the schedule is made for the full run. 0 is off."""
    exit_iteration_this_run: Count = 0
    """Stop after this many optimizer steps of this start; 0 is off."""
    overfit_first_batch: bool = False
    """Train on the first batch over and over, to see that the model can learn it."""
    kill_switch_path: Path | None = None
    """Training saves and stops when this file appears; by default `stop` in the run directory."""
    hang_timeout: Count | None = None
    """Seconds in which a worker has to begin something new (a stage, a forward pass, a batch); one that has not is
    taken to hang, tells where in the code it is, and ends the run. By default 1,800 with several workers, and 0 (off)
    with one."""
    metadata: dict[str, Any] = {}
    """Notes of your own: kept with the run, read by nothing."""


class Recipe(CoreConfig):
    """A whole recipe: typed, frozen, every section checked by the part that owns it.

        recipe = ptrain.Recipe(type="sft", model={"name_or_path": "my-model"}, data={"sources": ["rows.jsonl"]})

    Its keys are those of a recipe file; a section may be a mapping or a part's own `Config`.

    Raises:
        RecipeError: every problem of every section.
        PluginError: a package that the recipe names can't be used.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            type: str,
            model: ModelConfig | Mapping[str, Any],
            data: DataConfig | Mapping[str, Any],
            **keys: Any,
        ) -> None: ...

    type: str
    """The trainer."""
    model: SerializeAsAny[ModelConfig]
    data: SerializeAsAny[DataConfig]
    tokenizer: SerializeAsAny[TokenizerConfig]
    optimizer: SerializeAsAny[OptimizerConfig]
    scheduler: SerializeAsAny[SchedulerConfig]
    checkpoint: list[SerializeAsAny[CheckpointConfig]] = []
    evaluation: list[SerializeAsAny[EvaluatorConfig]] = []
    trackers: list[SerializeAsAny[TrackerConfig]] = []
    logger: LoggerConfig = LoggerConfig()
    wandb: WandbConfig = WandbConfig()
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own configuration; what the recipe derives (batch sizes, precision, ...) may not stand here."""
    plugins: dict[str, SerializeAsAny[Config]] = {}
    """Features, in order, each with its own section."""
    trainer: SerializeAsAny[Config] = Config()
    """The trainer's own top-level keys."""

    def __str__(self) -> str:
        """The keys that were given, as YAML."""
        from ptrain.recipe import yaml12
        from ptrain.recipe.dump import dump

        return yaml12.write(dump(self))

    @model_validator(mode="before")
    @classmethod
    def _load(cls, data: Any) -> Any:
        """Keys as a file has them become sections; `trainer`, which no file has, is there where they are already."""
        if not isinstance(data, Mapping) or "trainer" in data:
            return data
        from ptrain.recipe.dump import plain
        from ptrain.recipe.load import load_recipe

        recipe = load_recipe(plain(data)).recipe
        return {name: getattr(recipe, name) for name in recipe.model_fields_set}
