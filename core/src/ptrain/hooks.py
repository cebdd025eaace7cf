"""Every stage of a run, in run order: the page that a plugin author reads.

Mark an implementation with `@ptrain.hookimpl` and take only the arguments you need; `run` is always first.

Kinds:
    first: the topmost layer that does not return None answers.
    all: every layer is called, bottom-up.

An argument that may be None may be left out of `run.call(stage, ...)`.

`@ptrain.hookimpl(wrapper=True)` makes a wrapper: `result = yield`, then return the result. Layers, bottom-up:
core's defaults (`ptrain.stages`), the trainer, the features of `plugins:` in order, the user's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ptrain.errors import Problem
    from ptrain.model.head import Head
    from ptrain.parts import Checkpoint, Source
    from ptrain.results import Batch, Loss, StepResult
    from ptrain.run import Run

hookspec = pluggy.HookspecMarker("ptrain")
hookimpl = pluggy.HookimplMarker("ptrain")

F = TypeVar("F", bound=Callable[..., Any])


def callback(event: str) -> Callable[[F], F]:
    """Mark a function of user code as a callback: `@ptrain.callback("pre-loss")` or `"post-load"`, say.

    A `pre-` callback takes any of the stage's arguments by name and may return a mapping with new values; a
    `post-` callback takes `(run, result)` and may return another result.
    """

    def mark(function: F) -> F:
        setattr(function, CALLBACK, (*getattr(function, CALLBACK, ()), event))
        return function

    return mark


CALLBACK = "ptrain_callback"


@hookspec
def configure(run: Run) -> list[Problem] | None:
    """Check rules across sections; return what is wrong. Kind: all.

    When: after every section was validated by its owner, before anything is loaded. No torch, no network.
    `run.derive(key, value, because=...)` sets a value of the recipe that was not given.
    """
    ...


@hookspec(firstresult=True)
def create_tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with its chat template. Kind: first. Default: the tokenizer part.

    When: while data is prepared and again in every worker. Sets `run.tokenizer`.
    """
    ...


@hookspec(firstresult=True)
def load(run: Run, source: Source) -> Dataset:
    """Return the rows of one source. Kind: first. Default: `source.load`.

    When: during preparation, once for each source.
    Raises: DataError with file, row and field.
    """
    ...


@hookspec(firstresult=True)
def split(run: Run, dataset: Dataset) -> Mapping[str, Dataset]:
    """Return `{"train": rows, "eval": rows}`. Kind: first. Default: `data.train_eval_split`.

    When: after the training sources were loaded and joined; the rows of `eval_sources` are added to "eval"
    afterwards. A part without rows is an empty Dataset, never None.
    """
    ...


@hookspec(firstresult=True)
def process(run: Run, split: str, dataset: Dataset) -> Dataset:
    """Return token rows for `split`: `input_ids`, `labels`, `document_lengths`. Kind: first.

    Default: render, tokenise, mask, over-length policy, pack; the trainer supplies it. Each is a list of
    ints; `labels` is aligned with `input_ids` (not shifted), -100 where nothing is learnt. Further columns are kept.
    When: during preparation, before any process group exists; the result is cached.
    """
    ...


@hookspec(firstresult=True)
def create_dataloader(run: Run, split: str, dataset: Dataset) -> Iterable[Batch]:
    """Return the micro-batches of this worker. Kind: first. Default: pure sampler and collate.

    When: once for each split, in every worker. A batch holds `input_ids`, `shift_labels`, `position_ids`,
    `document_ids`, all int64 [b, s], `document_lengths`, and further columns of the rows as lists.
    """
    ...


@hookspec(firstresult=True)
def create_config(run: Run) -> PretrainedConfig:
    """Return the model's Hugging Face configuration. Kind: first. Default: the model part."""
    ...


@hookspec(firstresult=True)
def create_model(run: Run, config: PretrainedConfig) -> PreTrainedModel:
    """Return the model. Kind: first. Default: the model part. Wrap it to replace modules."""
    ...


@hookspec(firstresult=True)
def create_optimizer(run: Run, model: PreTrainedModel) -> torch.optim.Optimizer:
    """Return the optimizer. Kind: first. Default: the optimizer part."""
    ...


@hookspec(firstresult=True)
def create_scheduler(
    run: Run, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the learning-rate schedule; `total_steps` counts optimizer steps. Kind: first. Default: the part."""
    ...


@hookspec(firstresult=True)
def create_engine(
    run: Run,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> Any:
    """Return the engine that owns forward, backward and update. Kind: first. Default: DeepSpeed.

    Without an optimizer: the engine of a model that is asked and not trained, such as a reference.
    """
    ...


@hookspec
def before_training(run: Run) -> None:
    """Do what must happen once before the first step; collectives are allowed. Kind: all.

    When: after the engine exists and a checkpoint was loaded, in every worker.
    """
    ...


@hookspec(firstresult=True)
def count(run: Run, batch: Batch) -> Mapping[str, float]:
    """Return, by loss term, how many elements its sum runs over in this micro-batch. Kind: first.

    Default: `{"loss": number of labels}`. From the labels alone: it is called before any forward pass and
    must not use a collective; core adds the counts over the whole step and all workers.
    """
    ...


@hookspec(firstresult=True)
def forward(run: Run, model: PreTrainedModel, batch: Batch, layers: Sequence[int] | None) -> torch.Tensor:
    """Return the last hidden states [b, s, h], after the final norm; never logits. Kind: first.

    With `layers`, [b, s, n, h]: those hidden states, in the order of `layers` and numbered as transformers does
    (0 is the embeddings, i what goes into layer i, -1 what comes out of the final norm).
    """
    ...


@hookspec(firstresult=True)
def token_logprobs(run: Run, hidden: torch.Tensor, labels: torch.Tensor, head: Head | None) -> torch.Tensor:
    """Return log p(label) at each position, [b, s] fp32, 0 where the label is -100. Kind: first.

    `labels` are already shifted. Logits are computed only where there is a label: by `head`, which maps [n, h] to
    [n, v], or by the model's own output layer where it is left out.
    """
    ...


@hookspec(firstresult=True)
def token_nll(run: Run, hidden: torch.Tensor, labels: torch.Tensor, head: Head | None) -> torch.Tensor:
    """Return the sum of -log p(label) over the positions with a label, a scalar in fp32. Kind: first.

    Default: with its gradient formed in the forward pass; from `token_logprobs` where a plugin acts there. The
    arguments are as in `token_logprobs`. Where the sum is all that is needed, this takes less time and memory; it keeps
    the gradient of the output layer for the backward pass, of which there can be one.
    """
    ...


@hookspec(firstresult=True)
def token_argmax(run: Run, hidden: torch.Tensor, labels: torch.Tensor, head: Head | None) -> torch.Tensor:
    """Return the likeliest token at each position, int64 [b, s], -100 where the label is -100. Kind: first.

    Without a gradient. `head` is as in `token_logprobs`.
    """
    ...


@hookspec(firstresult=True)
def token_kl(
    run: Run, hidden: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return KL(teacher || student) of the next token at each position, [b, s] fp32, 0 where the label is -100.

    Kind: first. `hidden` and `teacher` are hidden states [b, s, h], from which the output layer makes logits that are
    divided by `temperature`; only `hidden` gets a gradient.
    """
    ...


@hookspec(firstresult=True)
def sequence_sum(run: Run, values: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
    """Return [n] fp32: the sums of `values` [b, s] by `segment_ids` (int64 [b, s], below 0 is left out).

    Of `values` [b, s, ...] it is [n, ...]. Kind: first. n is the largest id + 1. Differentiable; who shards sequences
    adds the all-reduce.
    """
    ...


@hookspec(firstresult=True)
def step(run: Run, batches: list[Batch]) -> StepResult:
    """Return what an optimizer step over its micro-batches gave: losses, one division, backward, update. Kind: first.

    When: once for each optimizer step, with all of this worker's micro-batches of it.
    """
    ...


@hookspec(firstresult=True)
def prepare_batch(run: Run, batch: Batch) -> Batch:
    """Return the micro-batch that `loss` is given. Kind: first. Default: the batch as it is. Wrap it to add to it.

    When: before the forward pass of each micro-batch, in training and in evaluation, with its tensors on the device. It
    is outside the engine's forward pass, so another model may be asked here, and a batch of which a plugin has cut the
    sequences is cut already.
    """
    ...


@hookspec(firstresult=True)
def loss(run: Run, batch: Batch) -> Loss:
    """Return the loss of one micro-batch, as sums. Kind: first. Default: none, the trainer gives it.

    A scalar tensor, a mean over samples, is taken as one term over samples.
    """
    ...


@hookspec(firstresult=True)
def evaluate(run: Run) -> Mapping[str, float]:
    """Return the metrics of the evaluation data. Kind: first. Default: every evaluator of `evaluation`."""
    ...


@hookspec(firstresult=True)
def checkpoint(run: Run, part: Checkpoint, path: Path) -> Path:
    """Fill the empty folder `path` and return it. Kind: first. Default: `part.save`.

    When: once for each checkpoint part that is due. Core owns `path`: hashes, renames, the pointer.
    """
    ...


@hookspec
def save_state(run: Run) -> Mapping[str, Any] | None:
    """Return what this plugin must find again after a resume: JSON values and tensors by name. Kind: all."""
    ...


@hookspec
def load_state(run: Run, state: Mapping[str, Any]) -> None:
    """Take back what `save_state` of this plugin returned. Kind: all."""
    ...


@hookspec
def on_start(run: Run) -> None:
    """Observe the start of training. Kind: all. Observers use no collectives and never `.item()`."""
    ...


@hookspec
def on_step_end(run: Run, result: StepResult) -> None:
    """Observe the end of an optimizer step. Kind: all."""
    ...


@hookspec
def on_evaluate_end(run: Run, metrics: Mapping[str, float]) -> None:
    """Observe the end of an evaluation. Kind: all."""
    ...


@hookspec
def on_checkpoint(run: Run, path: Path) -> None:
    """Observe that a checkpoint was written and pointed to. Kind: all."""
    ...


@hookspec
def on_exception(run: Run, error: BaseException) -> None:
    """Observe that the run failed. Kind: all."""
    ...


@hookspec
def on_end(run: Run) -> None:
    """Observe the end of the run. Kind: all."""
    ...
