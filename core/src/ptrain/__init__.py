"""ptrain: post-training of language models from declarative recipes. Importing it imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ptrain.errors import (
    CheckpointError,
    DataError,
    ModelError,
    PluginError,
    Position,
    Problem,
    PtrainError,
    RecipeError,
    TrainingError,
)
from ptrain.hooks import callback, hookimpl
from ptrain.local import register
from ptrain.parts import (
    Checkpoint,
    Evaluator,
    Feature,
    Model,
    Optimizer,
    Scheduler,
    Source,
    Tokenizer,
    Tracker,
    Trainer,
)
from ptrain.recipe.config import Config
from ptrain.recipe.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluatorConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    SchedulerConfig,
    SourceConfig,
    TokenizerConfig,
    TrackerConfig,
)
from ptrain.results import Batch, Loss, Progress, StepResult

if TYPE_CHECKING:
    from ptrain import stages
    from ptrain.api import OpenRun, Result, open_recipe, open_run, train
    from ptrain.checkpoint.huggingface import HuggingFaceCheckpoint
    from ptrain.model.huggingface import HuggingFaceModel
    from ptrain.run import Run

LAZY = {
    "HuggingFaceCheckpoint": "ptrain.checkpoint.huggingface",
    "HuggingFaceModel": "ptrain.model.huggingface",
    "OpenRun": "ptrain.api",
    "Result": "ptrain.api",
    "Run": "ptrain.run",
    "open_recipe": "ptrain.api",
    "open_run": "ptrain.api",
    "train": "ptrain.api",
}


def __getattr__(name: str) -> Any:
    if name == "stages":
        return importlib.import_module("ptrain.stages")
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("ptrain-core")
    raise AttributeError(f"module `ptrain` has no attribute `{name}`")


__all__ = [
    "Batch",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "Config",
    "DataConfig",
    "DataError",
    "Evaluator",
    "EvaluatorConfig",
    "Feature",
    "HuggingFaceCheckpoint",
    "HuggingFaceModel",
    "Loss",
    "Model",
    "ModelConfig",
    "ModelError",
    "OpenRun",
    "Optimizer",
    "OptimizerConfig",
    "PluginError",
    "Position",
    "Problem",
    "Progress",
    "PtrainError",
    "Recipe",
    "RecipeError",
    "Result",
    "Run",
    "Scheduler",
    "SchedulerConfig",
    "Source",
    "SourceConfig",
    "StepResult",
    "Tokenizer",
    "TokenizerConfig",
    "Tracker",
    "TrackerConfig",
    "Trainer",
    "TrainingError",
    "callback",
    "hookimpl",
    "open_recipe",
    "open_run",
    "register",
    "stages",
    "train",
]
