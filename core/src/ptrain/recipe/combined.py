"""What is wrong with a recipe whose sections are each right: values that exclude each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ptrain.errors import Problem
from ptrain.recipe.document import Document, Place
from ptrain.recipe.sections import CheckpointConfig, Recipe

STAGE: Place = ("deepspeed", "zero_optimization", "stage")


def combined_problems(recipe: Recipe, checkpoints: Sequence[Any], document: Document) -> list[Problem]:
    """Every such problem; `checkpoints` are the parts of `recipe.checkpoint`, in order."""
    found = _checkpoints(recipe, checkpoints, document), _evaluators(recipe, document), _deepspeed(recipe, document)
    return [*itertools.chain(*found)]


def _checkpoints(recipe: Recipe, parts: Sequence[Any], document: Document) -> Iterator[Problem]:
    enabled = [at for at, config in enumerate(recipe.checkpoint) if config.enabled]
    resuming = [at for at in enabled if recipe.checkpoint[at].auto_resume]
    if len(resuming) > 1:
        yield Problem(
            f"{len(resuming)} entries of `checkpoint` have `auto_resume`",
            document.position(("checkpoint", resuming[1], "auto_resume")), "one at most",
        )  # fmt: skip
    taken: dict[Any, int] = {}
    for at in enabled:
        given = recipe.checkpoint[at].output_dir
        folder = given.absolute() if given is not None else default_folder(parts[at], recipe.checkpoint[at])
        if folder in taken:
            yield Problem(
                f"entries {taken[folder] + 1} and {at + 1} of `checkpoint` would write into the same folder",
                document.position(("checkpoint", at) if given is None else ("checkpoint", at, "output_dir")),
                fix="give one of them an `output_dir` of its own",
            )
        taken.setdefault(folder, at)


def _evaluators(recipe: Recipe, document: Document) -> Iterator[Problem]:
    taken: dict[tuple[str, str | None], int] = {}
    for at, config in enumerate(recipe.evaluation):
        name = config.type, config.name
        if name in taken:
            yield Problem(
                f"entries {taken[name] + 1} and {at + 1} of `evaluation` would record metrics of the same names",
                document.position(("evaluation", at) if config.name is None else ("evaluation", at, "name")),
                fix="give each a `name` of its own, with which its metrics begin",
            )
        taken.setdefault(name, at)


def default_folder(part: Any, config: CheckpointConfig) -> str:
    """Where in the run directory the checkpoints of a part go that has no `output_dir`."""
    return part.folder or config.type.rpartition(":")[2]


def _deepspeed(recipe: Recipe, document: Document) -> Iterator[Problem]:
    """Settings of DeepSpeed 0.19 that fail, or train something else than they say."""
    zero = recipe.deepspeed.get("zero_optimization") or {}
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            yield Problem(
                f"`deepspeed.zero_optimization.{name}.device` is `nvme`, where no checkpoint can read the state from",
                document.value_position(("deepspeed", "zero_optimization", name, "device")), fix="write `cpu`",
            )  # fmt: skip
    if zero.get("stage") != 0:
        return
    if recipe.model.dtype == "fp16":
        yield Problem(
            "DeepSpeed does not train fp16 at ZeRO stage 0", document.value_position(STAGE), "stage 1, 2 or 3",
            fix="write `stage: 1`, or `model.dtype: bf16`",
        )  # fmt: skip
    optimizer = recipe.optimizer.type.rpartition(":")[2]
    if optimizer == "fused_adam" and recipe.model.dtype != "fp32":
        yield Problem(
            f"the state of `fused_adam` in {recipe.model.dtype} at ZeRO stage 0 can't be read by a checkpoint",
            document.value_position(STAGE), "stage 1, 2 or 3", fix="write `stage: 1`, or `optimizer.type: adamw`",
        )  # fmt: skip
