"""The trainer `dpo`: direct preference optimisation on pairs of a better and a worse answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

import ptrain
from ptrain_dpo.data import DPOData

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from ptrain import Batch, Loss, Problem, Run
    from ptrain_dpo.losses import Pairs


class DPO(ptrain.Trainer):
    """`dpo`: the model is to prefer the chosen answer of each pair more than a reference does.

    Another loss is a subclass with its own `pair_losses`.
    """

    class Config(ptrain.Config):
        """Keys of `dpo`."""

        not_prepared: ClassVar[frozenset[str]] = frozenset(
            {"beta", "label_smoothing", "loss_type", "length_normalised", "reference", "ref_model"}
        )

        beta: Annotated[float, Field(gt=0)] = 0.1
        """How strongly the model is held to the reference: rewards are `beta` times the log-ratio."""
        label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
        """The share of pairs whose preference is taken to be wrong (`loss_type: sigmoid`)."""
        loss_type: str = "sigmoid"
        """`sigmoid` (DPO) or `ipo`."""
        length_normalised: bool | None = None
        """Use the mean log-probability of an answer's tokens instead of the sum; by default for `ipo` alone."""
        reference: Literal["cached", "online", "adapter_off", "none"] = "cached"
        """Where the reference's log-probabilities come from: computed once before training and kept, so that no second
        model is in memory; from a second model at every step; from the model itself without its adapter, at every
        step; or none, for losses that need no reference."""
        ref_model: dict[str, Any] = {}
        """The reference: it is the model that training begins with, which may be repeated here."""

        @model_validator(mode="after")
        def _smoothing(self) -> Any:
            if self.label_smoothing and self.loss_type != "sigmoid":
                raise ValueError(f"`label_smoothing` belongs to `loss_type: sigmoid`, not to `{self.loss_type}`")
            return self

    Data = DPOData
    parts = {
        "model": "huggingface",
        "tokenizer": "huggingface",
        "optimizer": "adamw",
        "scheduler": "huggingface",
        "source": "huggingface",
        "evaluator": "loss",
    }
    _reference: Any
    loss_types: ClassVar[tuple[str, ...]] = ("sigmoid", "ipo")
    """What `loss_type` may be."""

    @ptrain.hookimpl
    def configure(self, run: Run) -> list[Problem]:
        """Refuse a loss that there is not, and another reference than the model itself."""
        found = []
        where = run.loaded.positions.get
        if self.config.loss_type not in self.loss_types:
            known = ", ".join(f"`{name}`" for name in self.loss_types)
            message = f"there is no `loss_type` `{self.config.loss_type}`"
            found.append(ptrain.Problem(message, where(("loss_type",)), f"one of {known}"))
        if self.config.reference == "adapter_off" and not getattr(run.recipe.model, "peft_config", None):
            message = "`reference` is `adapter_off`, and `model.peft_config` gives the model no adapter"
            found.append(ptrain.Problem(message, where(("reference",)), fix="write `reference: cached`"))
        name = self.config.ref_model.get("name_or_path", run.recipe.model.name_or_path)
        if name != run.recipe.model.name_or_path:
            message = f"`ref_model` is `{name}`, but the reference is the model that training begins with"
            fix = "leave `ref_model` out; to prefer with another reference, begin with its weights"
            found.append(ptrain.Problem(message, where(("ref_model",)), f"`{run.recipe.model.name_or_path}`", fix))
        return found

    @ptrain.hookimpl
    def process(self, run: Run, split: str, dataset: Dataset) -> Dataset:
        """Each pair as one row of two documents."""
        from ptrain_dpo.data import process_pairs

        return process_pairs(run, split, dataset)

    @ptrain.hookimpl
    def before_training(self, run: Run) -> None:
        """Get the reference ready."""
        from ptrain_dpo.reference import REFERENCES

        self._reference = REFERENCES[self.config.reference](run, self.score)

    @ptrain.hookimpl(wrapper=True)
    def prepare_batch(self, run: Run) -> Any:
        """The batch with `reference`: what the reference makes of its rows, fp32 [rows, 2]."""
        batch = yield
        return {**batch, "reference": self._reference(run, batch)}

    @ptrain.hookimpl
    def count(self, run: Run, batch: Batch) -> Mapping[str, float]:
        """The number of pairs."""
        return {"loss": batch["rows"]}

    @ptrain.hookimpl
    def loss(self, run: Run, batch: Batch) -> Loss:
        """The sum over the pairs, and what is recorded of them."""
        from ptrain_dpo.losses import Pairs

        pairs = Pairs(*self.score(run, batch).unbind(1), *batch["reference"].unbind(1))
        return ptrain.Loss({"loss": self.pair_losses(pairs).sum()}, metrics=self._metrics(pairs))

    def pair_losses(self, pairs: Pairs) -> torch.Tensor:
        """The loss of each pair, fp32 [n]; a subclass computes another one here."""
        from ptrain_dpo.losses import LOSSES

        return LOSSES[self.config.loss_type](pairs, self.config.beta, self.config.label_smoothing)

    def score(self, run: Run, batch: Batch) -> torch.Tensor:
        """Log-probabilities of the chosen and the rejected answer of each row under `run.model`, fp32 [rows, 2].

        Sums over the tokens of an answer, or means where they are normalised by length.
        """
        labels, documents = batch["shift_labels"], batch["document_ids"]
        hidden = run.call("forward", model=run.model, batch=batch)
        logprobs = run.call("token_logprobs", hidden=hidden, labels=labels)
        if not batch["rows"]:
            # Under ZeRO-3 the backward pass, too, has to go through the model on every worker.
            return logprobs.new_zeros(0, 2) + 0.0 * logprobs.sum()
        first = 2 * documents.new_tensor(range(len(documents)))[:, None]
        segments = (documents + first).masked_fill(documents < 0, -1)
        sums = run.call("sequence_sum", values=logprobs, segment_ids=segments)
        if self._normalised:
            sums = sums / run.call("sequence_sum", values=(labels != -100).float(), segment_ids=segments)
        return sums.view(-1, 2)

    @property
    def _normalised(self) -> bool:
        given = self.config.length_normalised
        return self.config.loss_type == "ipo" if given is None else given

    def _metrics(self, pairs: Pairs) -> dict[str, tuple[Any, float]]:
        """Sums over the pairs, each with their number: rewards as DPO defines them, and how far the model has gone."""
        beta, n = self.config.beta, float(len(pairs.chosen))
        chosen = (pairs.chosen - pairs.reference_chosen).detach()
        rejected = (pairs.rejected - pairs.reference_rejected).detach()
        found = {
            "rewards/chosen": beta * chosen,
            "rewards/rejected": beta * rejected,
            "rewards/margins": beta * (chosen - rejected),
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": pairs.chosen.detach(),
            "logps/rejected": pairs.rejected.detach(),
            # Of the answers in the data, which the model did not write itself: an estimate, and it may be negative.
            "kl": (chosen + rejected) / 2,
        }
        return {name: (values.sum(), n) for name, values in found.items()}
