"""What is checked before any worker starts: that a run may go on, the model and the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.directory import SPEC
from ptrain.errors import CheckpointError, DataError, ModelError, RecipeError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from ptrain.recipe.load import Loaded
    from ptrain.recipe.sections import Recipe
    from ptrain.run import Run

BYTES_PER_PARAMETER = 12
"""fp32 weights and two moments: what a resumable checkpoint holds."""


def recipe_hash(loaded: Loaded, recipe: Recipe) -> str:
    """The hash of the keys that change results, and of the user's code."""
    from ptrain.local import CALLER
    from ptrain.recipe.dump import result_hash

    own = [offer.version for offer in loaded.origins.values() if offer.distribution == CALLER]
    return result_hash(recipe, "".join([loaded.user_code.sha256 if loaded.user_code else "", *sorted(own)]))


def check_paths(run: Run) -> None:
    """Raise RecipeError where the model or the tokenizer is named by a path, and none is there."""
    from ptrain import hub

    for section in ("model", "tokenizer"):
        name = getattr(run.recipe, section).name_or_path
        if name and (fault := hub.path_fault(name) or hub.folder_fault(section, name)):
            where = run.loaded.document.value_position((section, "name_or_path"))
            raise RecipeError(f"`{section}.name_or_path` is `{name}`: {fault}", where=where, expected=hub.NAME)


def check_same_recipe(run: Run) -> None:
    """Raise RecipeError where the run directory belongs to a recipe with other results."""
    from ptrain.recipe.dump import dump, features_without_effect, with_effect

    content = _spec(run)
    if content is None or content["recipe_hash"] == run.recipe_hash:
        return
    but = features_without_effect(run.recipe)
    changed = differing(with_effect(content["recipe"], but=but), with_effect(dump(run.recipe), but=but))
    raise RecipeError(
        f"`{run.dir}` belongs to a run of another recipe: " + ("; ".join(changed[:5]) or "the user code differs"),
        fix="resume with the recipe of that run, or give this one its own `output_dir`",
    )


def check_same_data(run: Run, data: str) -> None:
    """Raise CheckpointError where the run in the run directory was made with other rows.

    Args:
        data: the digest of the prepared training rows.
    """
    content = _spec(run)
    if content is not None and content["data"] != data:
        raise _other_data(f"the run in `{run.dir}`")


def _spec(run: Run) -> dict[str, Any] | None:
    path = run.dir / SPEC
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def check_same_run(run: Run, checkpoint: Path, data: str) -> None:
    """Raise CheckpointError where the checkpoint was made with another recipe or other data.

    Args:
        data: the digest of the prepared training rows.
    """
    from ptrain.checkpoint.resumable import saved_state

    state = saved_state(checkpoint)
    if state["recipe_hash"] != run.recipe_hash:
        raise CheckpointError(
            f"`{checkpoint}` belongs to a run of another recipe",
            fix="resume with the recipe of that run, or give `checkpoint` another `output_dir`",
        )
    if state["data"] != data:
        raise _other_data(f"`{checkpoint}`")


def _other_data(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} was made with other training data: the rows of `data.sources` are no longer the same",
        fix="put the files back as they were, or begin a new run from an export (`model.name_or_path`)",
    )


def check_same_model(run: Run, checkpoint: Path, model: PreTrainedModel) -> None:
    """Raise CheckpointError where the checkpoint was made with a model of other shapes, e.g. its folder has changed.

    Where a plugin may change the model, only what both have is compared here; a worker compares the rest.

    Args:
        model: as its configuration says, on any device.
    """
    from ptrain.checkpoint.resumable import refuse_other_model, saved_state
    from ptrain.engine_state import shapes
    from ptrain.model.huggingface import HuggingFaceModel

    saved, wanted = saved_state(checkpoint)["parameters"], shapes(model)
    if type(run.parts.model) is not HuggingFaceModel or run.stack.changes("create_model"):
        saved = {name: shape for name, shape in saved.items() if name in wanted}
        wanted = {name: shape for name, shape in wanted.items() if name in saved}
    refuse_other_model(checkpoint, saved, wanted)


def check_rows(run: Run, rows: int) -> None:
    """Raise DataError where several workers are to share less than one batch: some would have nothing to do.

    Args:
        rows: the training samples.
    """
    micro, accumulation = run.recipe.micro_batch_size, run.accumulation
    batch = micro * accumulation * run.data_world
    if run.data_world > 1 and rows < batch:
        raise DataError(
            f"there are {rows} training samples for {run.readers}: fewer than one batch of {batch} "
            f"({micro} `micro_batch_size` x {accumulation} `gradient_accumulation_steps` x {run.readers})",
            expected=f"at least {batch}",
            fix="take fewer `--workers`, a smaller `micro_batch_size`, or more data",
        )


def check_checkpoint_folders(run: Run, moved: Path | None = None) -> None:
    """Raise CheckpointError where a new run would write among the checkpoints of an older one.

    Args:
        moved: a folder that is renamed before the run begins, with all that is in it.
    """
    from ptrain.checkpoint import store
    from ptrain.saving import active

    for part in active(run):
        folder = part.config.output_dir
        if folder is None or (moved is not None and folder.absolute().is_relative_to(moved)):
            continue
        if found := store.saved(folder):
            raise CheckpointError(
                f"`{folder}` already holds checkpoints, such as `{found[-1].name}`, and this is a new run",
                fix="move them away, set another `output_dir` in `checkpoint`, or go on with that run (`--resume`)",
            )


def differing(old: Any, new: Any, at: str = "") -> list[str]:
    """`key: old -> new` for each value in which two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        found = [differing(old.get(k), new.get(k), f"{at}.{k}" if at else str(k)) for k in keys]
        return [line for lines in found for line in lines]
    return [] if old == new else [f"`{at}`: {old!r} -> {new!r}"]


def check_model(run: Run) -> None:
    """Make the model's configuration (`run.hf_config`), and see that the tokenizer fits it.

    Raises:
        ModelError: there is no such model, a key of it is unknown, the tokenizer has too many tokens, or layers that
            ZeRO-3 shards are to be compiled.
    """
    if run.recipe.model.compile:
        check_stage(run)
    run.hf_config = run.call("create_config")
    check_vocabulary(run)


def check_stage(run: Run) -> None:
    """Raise ModelError where ZeRO gathers weights between the operations of layers that are to be compiled."""
    if run.zero["stage"] == 3:
        raise ModelError(
            "layers whose weights are sharded by ZeRO stage 3 can't be compiled",
            fix="use stage 2 (`deepspeed: {zero_optimization: {stage: 2}}`), or leave out `model.compile`",
        )


def check_vocabulary(run: Run) -> None:
    """Raise ModelError where a token of the tokenizer has no row in the model's embeddings."""
    size = run.hf_config.get_text_config().vocab_size
    if len(run.tokenizer) > size:
        raise ModelError(
            f"the tokenizer has {len(run.tokenizer)} tokens, the model has {size} embeddings",
            fix=f"use a model with {len(run.tokenizer)} or more, or the model's own tokenizer",
        )


def check_given(run: Run, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DataError where a row that came as tokens holds one that the model has no embedding for.

    On a GPU such a token ends the process without a word of the row.

    Args:
        reports: of the prepared data, by split.
    """
    size = run.hf_config.get_text_config().vocab_size
    for report in reports.values():
        largest = report.get("largest_id", -1)
        if largest >= size:
            raise DataError(
                f"{report['largest_in']}: there is a token {largest}, and the model has {size} embeddings",
                fix="tokenise with the tokenizer of the model, or leave out `process: false`",
            )


def check_packing(run: Run, rows: Dataset) -> None:
    """Raise ModelError where rows hold several documents, which layers of the model don't keep apart."""
    from ptrain.model.apart import packed
    from ptrain.model.attention import implementation, refuse_packing

    wanted = getattr(run.recipe.model, "attn_implementation", None)
    if wanted is not None and packed(rows):
        refuse_packing(run.hf_config, implementation(run.hf_config, wanted))


def check_evaluation(run: Run, rows: Dataset) -> None:
    """Raise RecipeError where the recipe asks for evaluations in between, and there are no rows for them."""
    for key in ("eval_interval", "eval_at_start"):
        if getattr(run.recipe, key) and not len(rows) and all(one.needs_rows for one in run.parts.evaluators):
            raise RecipeError(
                f"`{key}` asks for evaluations, and there are no rows for them",
                where=run.loaded.document.value_position((key,)),
                fix="add `train_eval_split: [0.98, 0.02]`, say, or `eval_sources` to `data`",
            )


def check_evaluators(run: Run, rows: Dataset) -> None:
    """Let every evaluator that will measure see that it can; `rows` are those for evaluation.

    Raises:
        PtrainError: one can't.
    """
    for one in run.parts.evaluators:
        if len(rows) or not one.needs_rows:
            one.check(run, rows)


def check_positions(run: Run, splits: Sequence[Dataset], model: PreTrainedModel) -> None:
    """Warn where a document is longer than what the model was made for; raise ModelError where that can't be computed.

    Rotary positions go on beyond it, learnt ones end.

    Args:
        splits: the samples of each, if it has any.
        model: as its configuration says, on any device.
    """
    from ptrain.model.rows import first_position, learns_positions

    limit = getattr(run.hf_config.get_text_config(), "max_position_embeddings", None)
    limit = limit and limit - first_position(model)
    rows = (lengths for split in splits if len(split) for lengths in split["document_lengths"])
    longest = max((max(lengths) for lengths in rows), default=0)
    if not limit or longest <= limit:
        return
    message = f"a document has {longest:,} tokens, and the model has positions for {limit:,}"
    if learns_positions(model):
        besides = ", and `data.overlength`" if hasattr(run.recipe.data, "overlength") else ""
        raise ModelError(message, fix=f"set `data.max_length` to {limit} or less{besides}")
    run.warn(f"{message} (`model.hf_config_kwargs.max_position_embeddings` says that this is meant)")


def check_space(run: Run, directory: Path, parameters: int) -> None:
    """Raise CheckpointError where not even one checkpoint of so many parameters would fit on the disk."""
    from ptrain.directory import free_bytes
    from ptrain.saving import active

    need = parameters * BYTES_PER_PARAMETER
    for part in active(run):
        target = part.config.output_dir or directory
        free = free_bytes(Path(target).absolute())
        if free < need:
            raise CheckpointError(
                f"a checkpoint needs about {need:,} bytes, and `{target}` has {free:,} free",
                fix="free some space, or put the checkpoints on another disk (`output_dir`)",
            )


def blank_model(run: Run) -> PreTrainedModel:
    """The model as its configuration says, with the recipe's adapter, without memory for its parameters.

    Raises:
        ModelError: it can't be built, or not with the attention or the adapter that the recipe wants.
    """
    import copy

    import torch
    import transformers

    from ptrain.model.attention import implementation
    from ptrain.model.huggingface import HuggingFaceModel
    from ptrain.recipe.machine import PACKAGES

    part = run.parts.model
    auto = getattr(transformers, part.auto(run.hf_config))
    wanted = getattr(run.recipe.model, "attn_implementation", None)
    name = implementation(run.hf_config, wanted) if wanted is not None else None
    if wanted == "auto" and isinstance(part, HuggingFaceModel):
        name = part.attention(run.hf_config, torch.device("cpu")).name
    try:
        with torch.device("meta"):
            model = auto.from_config(
                copy.deepcopy(run.hf_config),
                attn_implementation=None if wanted in PACKAGES else name,  # those want their package and a GPU here
                **(part.code(run.hf_config) if isinstance(part, HuggingFaceModel) else {}),
            )
    except Exception as error:  # whatever a model makes of values that it can't do with
        raise _unbuildable(run, wanted, error) from error
    if isinstance(part, HuggingFaceModel):
        part.adapt(model)
    return model


def _unbuildable(run: Run, attention: str | None, error: Exception) -> ModelError:
    kind, first = run.hf_config.model_type, (str(error).strip() or type(error).__name__).splitlines()[0]
    if not isinstance(error, (ImportError, ValueError)):
        first = f"{type(error).__name__}: {first}"
    if "attention implementation" in first:
        return ModelError(
            f"a model of the type {kind} can't compute attention with `model.attn_implementation: {attention}`",
            fix="write `attn_implementation: eager`",
        )
    return ModelError(f"a model of the type {kind} can't be made from its configuration: {first}")
