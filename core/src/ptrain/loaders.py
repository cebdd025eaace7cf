"""The loaders of a run: core's pure sampler and collate, bound to this worker."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ptrain.data.collate import collate
from ptrain.data.loader import EvalLoader, TrainLoader
from ptrain.data.sampler import StepSampler

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain.data.loader import Collate
    from ptrain.run import Run


def train_loader(run: Run, dataset: Dataset) -> TrainLoader:
    """The training loader; iterating it begins at `run.progress.step`."""
    recipe = run.recipe
    sampler = StepSampler(
        len(dataset),
        recipe.micro_batch_size,
        run.accumulation,
        run.data_rank,
        run.data_world,
        recipe.data.seed,
        fixed=recipe.overfit_first_batch,
    )
    return TrainLoader(
        dataset, sampler, collate_for(run), pad_id(run), lambda: run.progress.step, recipe.data.dl_num_workers
    )


def eval_loader(run: Run, dataset: Dataset) -> EvalLoader:
    """The evaluation loader."""
    recipe = run.recipe
    size = recipe.eval_micro_batch_size or recipe.micro_batch_size
    return EvalLoader(
        dataset, collate_for(run), pad_id(run), size, run.data_rank, run.data_world, recipe.data.dl_num_workers
    )


def collate_for(run: Run) -> Collate:
    """Collate with the padding that the recipe asks for."""
    data = run.recipe.data
    length = data.max_length if data.pad_to == "max_length" else None
    return partial(collate, pad_id=pad_id(run), multiple=data.div_length, length=length)


def pad_id(run: Run) -> int:
    """The token of padding; any will do where the tokenizer has none, since nothing reads it."""
    found = run.tokenizer.pad_token_id
    return found if isinstance(found, int) else 0
