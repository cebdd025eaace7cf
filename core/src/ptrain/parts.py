"""The kinds of part: small classes with a typed `Config` and the one or two methods that do the work.

A section of the recipe chooses a part by `type`; core's default stages call it. To add one, subclass its
kind, nest a `Config`, and name the class in an entry point of the kind's group (`ptrain.source`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ptrain.recipe import sections
from ptrain.recipe.config import Config

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ptrain.run import Run


class Part:
    """A building block that a recipe names. `self.config` is its validated section."""

    kind: ClassVar[str] = ""
    Config: ClassVar[type[Config]] = Config

    def __init__(self, config: Any) -> None:
        self.config = config


class Source(Part):
    """Where rows come from (`data.sources`, `data.eval_sources`)."""

    kind = "source"
    Config = sections.SourceConfig
    samples: ClassVar[bool] = False
    """Whether `load` itself draws `sample_ratio` or `sample_count`; otherwise core does so afterwards."""

    def load(self, run: Run, split: str) -> Dataset:
        """The rows of `split` ("train" or "eval").

        Raises:
            DataError: with file, row and field of what is wrong.
        """
        raise NotImplementedError

    def fingerprint(self) -> Any:
        """JSON that changes whenever the rows do (file sizes and hashes, say); part of the cache key."""
        return None


class Tokenizer(Part):
    """Makes the tokenizer (`tokenizer`)."""

    kind = "tokenizer"
    Config = sections.TokenizerConfig

    def create(self, run: Run) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template."""
        raise NotImplementedError


class Model(Part):
    """Makes the model (`model`).

    Class attributes:
        registered_by: the module whose import tells transformers' Auto classes of the model's class, where it is not
            one of transformers' own.
        exported_as: the `type` of the checkpoint part that writes the model for others.
    """

    kind = "model"
    Config = sections.ModelConfig
    registered_by: ClassVar[str] = ""
    exported_as: ClassVar[str] = "huggingface"

    def create_config(self, run: Run) -> PretrainedConfig:
        """The Hugging Face configuration of the model."""
        raise NotImplementedError

    def create_model(self, run: Run, config: PretrainedConfig) -> PreTrainedModel:
        """The model, on CPU or as ZeRO-3 shards, in its training dtype."""
        raise NotImplementedError

    def auto(self, config: PretrainedConfig) -> str:
        """The name of transformers' class that loads what comes of the model."""
        return "AutoModelForCausalLM"

    def fingerprint(self, run: Run) -> Any:
        """JSON that changes whenever the weights that training begins with do; part of cache keys."""
        return [self.config.model_dump(mode="json"), run.recipe.seed]


class Optimizer(Part):
    """Makes the optimizer (`optimizer`)."""

    kind = "optimizer"
    Config = sections.OptimizerConfig

    def create(self, run: Run, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the parameters of `model` that require a gradient."""
        raise NotImplementedError


class Scheduler(Part):
    """Makes the learning-rate schedule (`scheduler`)."""

    kind = "scheduler"
    Config = sections.SchedulerConfig

    def create(
        self, run: Run, optimizer: torch.optim.Optimizer, total_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule; `total_steps` counts optimizer steps."""
        raise NotImplementedError


class Checkpoint(Part):
    """Writes one form of checkpoint (an entry of `checkpoint`).

    Core decides when to save and where, stages the files, hashes, renames and points to them: `save` only
    fills the empty folder it is given. Every worker calls it; what must be written once is rank 0's task.
    """

    kind = "checkpoint"
    Config = sections.CheckpointConfig
    resumable: ClassVar[bool] = False
    """Whether training can be resumed from what `save` writes."""
    folder: ClassVar[str] = ""
    """Where in the run directory it goes, if the recipe has no `output_dir`: `model` for a model that transformers
    loads; by default a folder with the name of the `type`."""

    def save(self, run: Run, path: Path) -> None:
        """Fill the empty folder `path`."""
        raise NotImplementedError

    def load(self, run: Run, path: Path) -> None:
        """Restore the run from `path`; only called where `resumable`."""
        raise NotImplementedError

    def verify(self, run: Run, path: Path) -> None:
        """Raise `CheckpointError` if what was written would not load; called on rank 0, before renaming."""

    def advice(self, path: Path) -> str:
        """What to do with what was saved in `path`, for the line that ends a run; by default nothing is said."""
        return ""


class Tracker(Part):
    """Records metrics. Called on rank 0 alone; a tracker that fails is reported once and then left out."""

    kind = "tracker"
    Config = sections.TrackerConfig

    def start(self, run: Run) -> None:
        """Called once before the first step (after a resume, `run.progress.step` is not 0)."""

    def log(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Called after each optimizer step and each evaluation; `metrics["step"]` is always there."""

    def finish(self, run: Run) -> None:
        """Called once at the end, also after a failure."""


class Evaluator(Part):
    """Measures the model on the evaluation data (an entry of `evaluation`)."""

    kind = "evaluator"
    Config = sections.EvaluatorConfig
    needs_rows: ClassVar[bool] = True
    """Whether it measures on the evaluation rows of `data`, and is left out where there are none; False for one that
    has data of its own."""

    def check(self, run: Run, rows: Dataset) -> None:
        """Raise DataError where there is nothing to measure on: in the end of a run it would be too late.

        Called before any worker starts, once `run.hf_config` is known.

        Args:
            rows: the prepared evaluation rows of `data`; none, where `needs_rows` is False and there are none.
        """

    def evaluate(self, run: Run) -> Mapping[str, tuple[float, float]]:
        """This worker's `(sum, count)` by metric; core adds them over the workers and divides once."""
        raise NotImplementedError


class Trainer:
    """Base of trainers: hook implementations, a `Config` of top-level keys, and default parts.

    A trainer extends another one by subclassing it. Class attributes:
        Config: the trainer's own top-level keys (`beta`, ...).
        Data: its `data` section, a subclass of `ptrain.DataConfig`.
        parts: the default `type` of a section, by kind ("model", "source", "optimizer", ...).
        callbacks: `(event, function)` pairs, e.g. `("post-load", drop_long)`.
    """

    Config: ClassVar[type[Config]] = Config
    Data: ClassVar[type[sections.DataConfig]] = sections.DataConfig
    parts: ClassVar[Mapping[str, str]] = {}
    callbacks: ClassVar[Sequence[tuple[str, Any]]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    def fingerprint(self, run: Run) -> Any:
        """JSON that changes whenever what this trainer makes of rows does; part of the cache key.

        For what is neither in the rows, the tokenizer, `data` nor the trainer's own keys: a prompt of the model, say.
        """
        return None


class Feature:
    """Base of features: what an entry of `plugins:` switches on. Hook implementations with a `Config`."""

    Config: ClassVar[type[Config]] = Config
    callbacks: ClassVar[Sequence[tuple[str, Any]]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config


KINDS: Mapping[str, type] = {
    "trainer": Trainer,
    "model": Model,
    "source": Source,
    "tokenizer": Tokenizer,
    "optimizer": Optimizer,
    "scheduler": Scheduler,
    "checkpoint": Checkpoint,
    "tracker": Tracker,
    "evaluator": Evaluator,
    "plugin": Feature,
}
"""Base class by kind; the entry-point group of a kind is `ptrain.<kind>`."""
