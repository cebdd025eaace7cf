"""The model of a recipe without memory for its parameters: made as a run makes it, by every layer of the stack."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptrain.errors import MissingModel, PluginError
from ptrain.plan.activations import TRACED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ptrain.run import Run


@dataclass(frozen=True)
class Parameters:
    """Sizes of what a model holds.

    Attributes:
        trained: shapes of the parameters that are trained, by group of the optimizer.
        frozen: sizes of the others, in elements.
        buffers: bytes of all buffers.
        saved_buffers: bytes of those that belong to its state.
    """

    trained: Sequence[Sequence[tuple[int, ...]]]
    frozen: Sequence[int]
    buffers: int
    saved_buffers: int

    @property
    def sizes(self) -> list[list[int]]:
        """Elements of each trained parameter, by group."""
        return [[_elements(shape) for shape in group] for group in self.trained]

    @property
    def trainable(self) -> int:
        """Elements that are trained."""
        return sum(map(sum, self.sizes))

    @property
    def total(self) -> int:
        """Elements of all parameters; tied ones once."""
        return self.trainable + sum(self.frozen)


class UnknownTokenizer:
    """Stands for a tokenizer that can't be made yet, as far as the configuration of a model asks for it."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def make_config(run: Run, unknown: list[str]) -> bool:
    """Make `run.hf_config`, and see that the tokenizer fits it where there is one; False where it is not here.

    Raises:
        ModelError: a key of it is unknown, or the tokenizer has too many tokens.
    """
    from ptrain import checks

    if not hasattr(run, "tokenizer"):
        size = getattr(run.recipe.tokenizer, "vocab_size", None)
        if getattr(run.recipe.model, "config", None) and size is None:
            unknown.append("parameters and memory: the vocabulary of `model.config` is that of the tokenizer")
            return False
        run.tokenizer = UnknownTokenizer(size or 0)  # type: ignore[assignment]
    try:
        checks.check_model(run)
    except MissingModel as error:
        unknown.append(f"parameters and memory: {error.problems[0].message}")
        return False
    return True


def make_model(run: Run, unknown: list[str]) -> PreTrainedModel:
    """The model on the device `meta`, in the dtype of the recipe; needs `run.hf_config`.

    Raises:
        ModelError: it can't be built, or a plugin refuses it.
    """
    import torch

    from ptrain import checks
    from ptrain.engine import quiet
    from ptrain.model.huggingface import HuggingFaceModel
    from ptrain.model.quantized import DTYPES

    quiet()
    part, model = run.parts.model, None
    if rounded := getattr(part.config, "quantization_config", None):
        bits = 8 if rounded.get("load_in_8bit") else 4
        unknown.append(f"memory of the weights that are rounded to {bits} bits: here they are counted in the dtype")
    traced = getattr(part.config, "attn_implementation", "eager") != "eager"
    if isinstance(part, HuggingFaceModel):
        part.blank = True
        if traced:
            part.config = part.config.model_copy(update={"attn_implementation": TRACED})
        try:
            with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
                model = run.call("create_model", config=run.hf_config)
        except PluginError as error:
            if error.__cause__ is None:
                raise
            # What code of others raises where there are no weights is no fault of it.
            unknown.append(f"what plugins make of the model: {error.problems[0].message}")
    else:
        unknown.append(f"what the model part `{run.recipe.model.type}` makes of the configuration")
    if model is None:
        model = checks.blank_model(run)
        if traced:
            model.set_attn_implementation(TRACED)
    return model.to(getattr(torch, DTYPES[run.recipe.model.dtype]))


def make_optimizer(run: Run, model: PreTrainedModel, unknown: list[str]) -> torch.optim.Optimizer:
    """The optimizer over the parameters of `model`, on the device `meta`; the Adams of DeepSpeed as torch's.

    Raises:
        ModelError: nothing is trained.
    """
    import torch

    from ptrain.optimizers import CPUAdam, FusedAdam, parameter_groups

    config = run.recipe.optimizer
    if not isinstance(run.parts.optimizer, (FusedAdam, CPUAdam)) or run.stack.changes("create_optimizer"):
        try:
            return run.call("create_optimizer", model=model)
        except PluginError as error:
            if error.__cause__ is None:
                raise
            line = f"what the optimizer keeps, here taken to be as much as AdamW: {error.problems[0].message}"
            if line not in unknown:
                unknown.append(line)
    # They keep as much, and this one needs no compiler.
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate)


def parameters(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Parameters:
    """The sizes of a model and of what an optimizer trains of it."""
    from ptrain.engine_state import buffers

    groups = [group["params"] for group in optimizer.param_groups if group["params"]]
    trained = {id(p) for group in groups for p in group}
    return Parameters(
        [[tuple(p.shape) for p in group] for group in groups],
        [p.numel() for p in model.parameters() if id(p) not in trained],
        sum(buffer.nbytes for buffer in model.buffers()),
        sum(buffer.nbytes for _, buffer in buffers(model)),
    )


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
