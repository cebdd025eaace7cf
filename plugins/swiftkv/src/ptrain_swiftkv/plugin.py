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

    from ptrain import Batch, Loss, Problem, Run


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
        return student_config(base, self.config.num_key_value_layers, self.config.key_value_group_size)

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
    def configure(self, run: Run) -> list[Problem]:
        """Refuse layers that the model has not, where its configuration is at hand."""
        from ptrain_swiftkv.rules import fault, known_keys

        model: Any = run.recipe.model
        if not isinstance(model, SwiftKVModel.Config) or not (keys := known_keys(model)):
            return []
        where = run.loaded.positions.get
        found = fault(keys, model.num_key_value_layers, model.key_value_group_size)
        if found is not None:
            at = where(("model", found.key)) or where(("model",))
            return [ptrain.Problem(found.message, at, found.expected, found.fix)]
        layers, at = keys.get("num_hidden_layers"), self.config.hidden_loss_layer
        if isinstance(layers, int) and not -layers - 1 <= at <= layers:
            message = f"`hidden_loss_layer` is {at}, and the model has {layers} layers"
            return [ptrain.Problem(message, where(("hidden_loss_layer",)), f"{-layers - 1} to {layers}")]
        return []

    @ptrain.hookimpl(wrapper=True)
    def create_tokenizer(self, run: Run) -> Any:
        """Tell transformers of a student first, beside whose tokenizer it looks for a type of model that it knows."""
        import importlib

        from ptrain_swiftkv.rules import SUFFIX, known_keys

        if str(known_keys(run.recipe.model).get("model_type")).endswith(SUFFIX):
            importlib.import_module(SwiftKVModel.registered_by)
        return (yield)

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
