"""The trainer `spec-decode`: heads that draft tokens for a base, which stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

import ptrain
from ptrain_sft.plugin import SFT

if TYPE_CHECKING:
    from ptrain import Batch, Loss, Problem, Run, StepResult

Positive = Annotated[int, Field(ge=1)]
MOVED = (
    "speculator_path", "gen_train", "gen_prompt_length", "gen_seq_length", "gen_micro_batch_size",
    "gen_train_micro_batch_size", "gen_train_global_batch_size", "gen_temperature", "gen_top_k",
)  # fmt: skip


class SpecDecode(SFT):
    """`spec-decode`: the heads of a speculator learn what follows the base's own next token."""

    class Config(ptrain.Config):
        """Keys of `spec-decode`; they may stand in `model`, too."""

        aliases: ClassVar[Mapping[str, str]] = {f"model.{name}": name for name in MOVED}
        not_prepared: ClassVar[frozenset[str]] = frozenset(MOVED)

        speculator_path: Path | None = None
        """Begin with the speculator that is saved in this folder, whose sizes then need not be given."""
        gen_train: bool = False
        """Stage 2: train on what the base itself generates, at each step, from the beginnings of the rows."""
        gen_prompt_length: Positive = 64
        """With `gen_train`, the tokens of a row that the base goes on from; shorter rows are used whole."""
        gen_seq_length: Positive = 256
        """With `gen_train`, the tokens that the base generates for each row."""
        gen_micro_batch_size: Positive = 384
        """With `gen_train`, the rows that one worker generates at a time."""
        gen_train_micro_batch_size: Positive = 32
        """With `gen_train`, the generated rows that one worker trains on at a time."""
        gen_train_global_batch_size: Positive | None = None
        """With `gen_train`, the generated rows of one optimizer step."""
        gen_temperature: Annotated[float, Field(ge=0)] = 1.0
        """With `gen_train`, the temperature that the base samples with; 0 takes the likeliest token."""
        gen_top_k: Annotated[int, Field(ge=0)] = 10
        """With `gen_train`, how many of the likeliest tokens the base samples from; 0 is all of them."""

        @field_validator("speculator_path")
        @classmethod
        def _at_home(cls, value: Path | None) -> Path | None:
            return value.expanduser() if value is not None else None

    parts = {**SFT.parts, "model": "speculator"}

    @ptrain.hookimpl
    def configure(self, run: Run) -> list[Problem]:
        """Refuse a model part that puts no speculator into the model, and an engine that can't serve it."""
        from ptrain_spec_decode.model import SpeculatorModel

        where = run.loaded.document.value_position
        if not issubclass(run.loaded.model, SpeculatorModel):
            message = f"the model part `{run.recipe.model.type}` makes no speculator"
            return [ptrain.Problem(message, where(("model", "type")), "`speculator`", "leave `model.type` out")]
        kind, found = _kind(run)
        for at, entry in enumerate(run.recipe.checkpoint):
            if getattr(entry, "served_by", None) == "vllm" and kind == "lstm":
                message = "vLLM itself serves no speculator of the kind `lstm`"
                place = where(("checkpoint", at, "served_by"))
                found.append(ptrain.Problem(message, place, fix="write `served_by: arctic`, or leave it out"))
        return found

    @ptrain.hookimpl
    def before_training(self, run: Run) -> None:
        """Say early where nothing will serve what is trained; refuse texts that the base has no positions for."""
        from ptrain_spec_decode.model import speculator_of
        from ptrain_spec_decode.sampling import refuse_beyond_positions

        if run.config.gen_train:
            keys = "`gen_seq_length` or `gen_prompt_length`"
            refuse_beyond_positions(run.model, run.config.gen_prompt_length, run.config.gen_seq_length, keys)
        kinds = {part.type for part in run.recipe.checkpoint if part.enabled}
        if "huggingface" in kinds and "speculator" not in kinds:
            run.warn(
                "the checkpoint `huggingface` saves the whole base, with a speculator in it that no engine looks for; "
                "`type: speculator` saves what is trained, as engines load it"
            )
        problem = speculator_of(run).shape.unserved
        if problem is not None:
            run.warn(f"Arctic Inference, which serves this kind of speculator, can't load {problem}")

    @ptrain.hookimpl(wrapper=True)
    def create_dataloader(self, run: Run) -> Any:
        """Batches with the targets of each head."""
        from ptrain.data.attached import Attached
        from ptrain_spec_decode.targets import with_targets

        heads = run.parts.model.heads(run)
        return Attached((yield), lambda batch: with_targets(batch, heads))

    @ptrain.hookimpl
    def step(self, run: Run, batches: list[Batch]) -> StepResult | None:
        """In stage 2, an optimizer step on what the base generates; otherwise core's."""
        if not run.config.gen_train:
            return None
        from ptrain_spec_decode.stage2 import generated_step

        return generated_step(run, batches)

    @ptrain.hookimpl
    def count(self, run: Run, batch: Batch) -> Mapping[str, float]:
        """By head, the number of its targets."""
        from ptrain_spec_decode.losses import term
        from ptrain_spec_decode.targets import IGNORED, LABELS

        there = (batch[LABELS] != IGNORED).flatten(0, -2).sum(0).tolist()
        return {term(i): count for i, count in enumerate(there)}

    @ptrain.hookimpl
    def loss(self, run: Run, batch: Batch) -> Loss:
        """The cross-entropy of each head; in evaluations also how often it is right."""
        from ptrain_spec_decode.losses import base_states, heads_loss

        hidden = batch["hidden"] if "hidden" in batch else base_states(run, batch)
        return heads_loss(run, hidden, batch, measure=batch["split"] == "eval")


def _kind(run: Run) -> tuple[str, list[Problem]]:
    """The kind of the speculator, and what is wrong with `speculator_path`, as far as it alone tells."""
    from dataclasses import replace

    from ptrain_spec_decode.saved import read

    kind = getattr(run.recipe.model, "speculator", "")
    if run.config.speculator_path is None:
        return kind, []
    try:
        return read(run.config.speculator_path)[0].kind, []
    except ptrain.ModelError as error:
        place = run.loaded.document.value_position(("speculator_path",))
        return kind, [replace(problem, where=place) for problem in error.problems]
