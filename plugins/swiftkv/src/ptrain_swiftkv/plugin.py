"""The trainer `swiftkv`, and the model part of that name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

import ptrain
from ptrain_sft.plugin import SFT

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from ptrain import Batch, Loss, Run


class SwiftKVModel(ptrain.HuggingFaceModel):
    """A model whose later layers share keys and values, which are made of what comes out of the earlier ones."""

    class Config(ptrain.HuggingFaceModel.Config):
        """Keys of `swiftkv`."""

        num_key_value_layers: Annotated[int, Field(ge=1)] | None = None
        """How many layers, the first ones, stay as they are; the others share keys and values. Needed unless
        `name_or_path` is a SwiftKV model already."""
        key_value_group_size: Annotated[int, Field(ge=1)] | None = None
        """How many of the later layers share one set of keys and values; by default 1: each has its own."""

        @model_validator(mode="after")
        def _trains_itself(self) -> Any:
            for key in ("peft_config", "quantization_config"):
                if getattr(self, key):
                    raise ValueError(
                        f"`{key}` has no place in SwiftKV, which trains projections of its own: leave it out"
                    )
            return self

    config: Config
    registered_by = "ptrain_swiftkv.models"

    def create_config(self, run: Run) -> PretrainedConfig:
        """The configuration of the student.

        Raises:
            ModelError: the family is not supported, has not these layers, or the model is a student with others.
        """
        from ptrain_swiftkv.student import student_config

        base = super().create_config(run)
        if base.model_type.endswith("_swiftkv"):
            self._check_same(base)
            return base
        if self.config.num_key_value_layers is None:
            half = max(1, base.num_hidden_layers // 2)
            raise ptrain.ModelError(
                f"the recipe doesn't say how many of the {base.num_hidden_layers} layers stay as they are",
                fix=f"give `model.num_key_value_layers`, e.g. {half}",
            )
        return student_config(base, self.config.num_key_value_layers, self.config.key_value_group_size or 1)

    def create_model(self, run: Run, config: PretrainedConfig) -> PreTrainedModel:
        """The student, of which only what is its own is trained; it begins as near to the teacher as can be."""
        from ptrain_swiftkv.student import begin, freeze

        continued = super().create_config(run).model_type == config.model_type
        self.may_lack = "" if continued else r"_swiftkv\."
        model = super().create_model(run, config)
        if not continued:
            begin(model)
        freeze(model)
        return model

    def _check_same(self, found: Any) -> None:
        for key in ("num_key_value_layers", "key_value_group_size"):
            wanted = getattr(self.config, key)
            if wanted not in (None, getattr(found, key)):
                raise ptrain.ModelError(
                    f"`model.{key}` is {wanted}, and `{self.config.name_or_path}` is a SwiftKV model with "
                    f"{getattr(found, key)}",
                    fix=f"leave `{key}` out to train it further, or name the model that it was made from",
                )


class SwiftKV(SFT):
    """`swiftkv`: the model is to do with shared keys and values what it does with keys and values in every layer.

    Qiao et al., 2024: the divergence from the teacher's next token, and the distance from its hidden states.
    """

    class Config(ptrain.Config):
        """Keys of `swiftkv`."""

        not_prepared: ClassVar[frozenset[str]] = frozenset(
            {"logits_loss_temp", "hidden_loss_mult", "hidden_loss_layer"}
        )

        logits_loss_temp: Annotated[float, Field(gt=0)] = 2.0
        """What the logits of teacher and student are divided by before they are compared."""
        hidden_loss_mult: Annotated[float, Field(ge=0)] = 1.0
        """The weight of the distance between hidden states."""
        hidden_loss_layer: int = -2
        """Which hidden states are compared: 0 is the embeddings, i what goes into layer i (the first is 0), -1 what
        comes out of the final norm."""

    parts = {**SFT.parts, "model": "swiftkv"}

    @ptrain.hookimpl
    def before_training(self, run: Run) -> None:
        """Say where nothing is to be learnt."""
        config = run.hf_config
        if config.kept == config.num_hidden_layers:
            run.warn("`model.num_key_value_layers` keeps every layer, so that there is nothing to learn")
        elif self.config.hidden_loss_mult and self._shared_with_the_teacher(run):
            run.warn(
                f"`hidden_loss_layer` {self.config.hidden_loss_layer} lies before the layers that share keys and "
                "values, where student and teacher are the same: that part of the loss is always 0"
            )

    @ptrain.hookimpl
    def count(self, run: Run, batch: Batch) -> Mapping[str, float]:
        """The number of labels, and of tokens."""
        found = {"logits": int((batch["shift_labels"] != -100).sum())}
        if self.config.hidden_loss_mult:
            found["hidden"] = int((batch["document_ids"] >= 0).sum())
        return found

    @ptrain.hookimpl
    def loss(self, run: Run, batch: Batch) -> Loss:
        """The divergence at labels, times the squared temperature, and the squared distance at all tokens."""
        teacher, student = self._both(run, batch)
        labels, temperature = batch["shift_labels"], self.config.logits_loss_temp
        divergence = run.call(
            "token_kl", hidden=student[:, :, 0], teacher=teacher[:, :, 0], labels=labels, temperature=temperature
        )
        sums = {"logits": temperature**2 * divergence.sum()}
        if self.config.hidden_loss_mult:
            distance = (student[:, :, 1] - teacher[:, :, 1]).float().square().mean(-1)
            sums["hidden"] = distance.masked_fill(batch["document_ids"] < 0, 0.0).sum()
        metrics = {} if run.model.training else self._agreement(run, student[:, :, 0], teacher[:, :, 0], labels)
        return ptrain.Loss(sums, {"hidden": self.config.hidden_loss_mult}, metrics)

    def _both(self, run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of teacher and student [b, s, n, h]: the last ones, and those of `hidden_loss_layer`."""
        import contextlib

        import torch

        from ptrain_swiftkv.models.body import as_teacher, reusing_trunk

        layers = (-1, self.config.hidden_loss_layer) if self.config.hidden_loss_mult else (-1,)
        # The ordinary layers are the same for both; they are gone through again only to look at one of them.
        again = self.config.hidden_loss_mult and self._shared_with_the_teacher(run)
        with contextlib.nullcontext() if again else reusing_trunk(run.model):
            with torch.no_grad(), as_teacher(run.model):
                teacher = run.call("forward", model=run.model, batch=batch, layers=layers)
            return teacher, run.call("forward", model=run.model, batch=batch, layers=layers)

    def _shared_with_the_teacher(self, run: Run) -> bool:
        at, count = self.config.hidden_loss_layer, run.hf_config.num_hidden_layers
        return (at + count + 1 if at < 0 else at) <= run.hf_config.kept < count or run.hf_config.kept == count

    def _agreement(self, run: Run, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> Any:
        """How often both think the same token the likeliest."""
        ours, theirs = (run.call("token_argmax", hidden=states, labels=labels) for states in (student, teacher))
        there = labels != -100
        return {"teacher_agreement": (((ours == theirs) & there).sum().float(), float(there.sum()))}
