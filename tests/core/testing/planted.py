"""Plugins with a defect each, as a package that is really installed: what `test_defects.py` puts on the path.

Each says in its docstring what is wrong with it.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import ptrain
from ptrain.checkpoint.resumable import DeepSpeedCheckpoint
from ptrain.data.sources.local import JsonLinesFiles
from ptrain.data.tokenizers import HuggingFaceTokenizer
from ptrain.evaluators import LossEvaluator
from ptrain.optimizers import AdamW
from ptrain.schedulers import HFScheduler
from ptrain_sft.plugin import SFT


def logprobs(run: Any, batch: Any) -> Any:
    hidden = run.call("forward", model=run.model, batch=batch)
    return run.call("token_logprobs", hidden=hidden, labels=batch["shift_labels"])


# Trainers


class WrongArgument(SFT):
    """Its loss wants an argument that there is not."""

    @ptrain.hookimpl
    def loss(self, run, batches):
        return None or ptrain.Loss({})


class Undocumented(SFT):
    """A key says nothing about itself."""

    class Config(ptrain.Config):
        factor: float = 1.0


class Untyped(SFT):
    """A key takes anything."""

    class Config(ptrain.Config):
        factor: Any = None
        """What for."""


class Open(SFT):
    """Its section takes every key."""

    class Config(ptrain.Config):
        model_config = {"extra": "allow"}


class Percent(SFT):
    """A value is divided each time that it is read."""

    class Config(ptrain.Config):
        share: float = 50.0
        """Percent."""

        def model_post_init(self, context: Any) -> None:
            object.__setattr__(self, "share", self.share / 100)


class Nan(SFT):
    """Its loss is no number."""

    @ptrain.hookimpl
    def loss(self, run, batch):
        return ptrain.Loss({"loss": -logprobs(run, batch).sum() * float("nan")})


class Careless(SFT):
    """A key is read by nothing, the step is remembered and not saved, logits are made by hand, errors are swallowed."""

    class Config(ptrain.Config):
        unused: float = 1.0
        """What for."""

    steps = 0

    @ptrain.hookimpl
    def on_step_end(self, run, result):
        self.steps += 1

    @ptrain.hookimpl
    def loss(self, run, batch):
        try:
            hidden = run.call("forward", model=run.model, batch=batch)
        except Exception:
            hidden = run.model.get_input_embeddings()(batch["input_ids"])
        logits = hidden @ run.model.get_output_embeddings().weight.T
        labels = batch["shift_labels"]
        where = labels != -100
        losses = -logits.log_softmax(-1)[where].gather(1, labels[where][:, None])
        return ptrain.Loss({"loss": losses.sum() * (1 + 0.1 * self.steps)})


class MeanOfMicroBatch(SFT):
    """Every micro-batch weighs the same, whatever it holds."""

    @ptrain.hookimpl
    def count(self, run, batch):
        return {"loss": 1.0}

    @ptrain.hookimpl
    def loss(self, run, batch):
        return ptrain.Loss({"loss": -logprobs(run, batch).sum() / (batch["shift_labels"] != -100).sum().clamp(min=1)})


class RowsByHand(SFT):
    """What a row sums up to is computed without `sequence_sum`, and then squared."""

    @ptrain.hookimpl
    def count(self, run, batch):
        return {"loss": float(batch["rows"])}

    @ptrain.hookimpl
    def loss(self, run, batch):
        return ptrain.Loss({"loss": (logprobs(run, batch).sum(1) / 100).square().sum()})


class Forgets(SFT):
    """How many rows there are is kept in `self` by preparation."""

    rows = 1

    @ptrain.hookimpl
    def process(self, run, split, dataset):
        self.rows = len(dataset)
        return super().process(run, split, dataset)

    @ptrain.hookimpl
    def loss(self, run, batch):
        return ptrain.Loss({"loss": -logprobs(run, batch).sum() * self.rows})


SEEN: list[int] = []


class Remembers(SFT):
    """How many rows there are is kept in the module by preparation."""

    @ptrain.hookimpl
    def process(self, run, split, dataset):
        SEEN.append(len(dataset))
        return super().process(run, split, dataset)

    @ptrain.hookimpl
    def loss(self, run, batch):
        return ptrain.Loss({"loss": -logprobs(run, batch).sum() * (1 + len(SEEN))})


class Needy(SFT):
    """A key is required."""

    class Config(ptrain.Config):
        factor: float
        """What the loss is multiplied by."""

    @ptrain.hookimpl
    def loss(self, run, batch):
        return ptrain.Loss({"loss": -logprobs(run, batch).sum() * self.config.factor})


# Features


class Noise(ptrain.Feature):
    """Draws from a generator of its own, which is not saved."""

    def __init__(self, config):
        super().__init__(config)
        self.random = random.Random(0)

    @ptrain.hookimpl(wrapper=True)
    def loss(self, run, batch):
        loss = yield
        return ptrain.Loss({name: value * (1 + self.random.random()) for name, value in loss.sums.items()})


class Steady(ptrain.Feature):
    """Nothing is wrong with it: a loss that grows a little, with its state saved."""

    class Config(ptrain.Config):
        growth: float = 0.1
        """How much the loss grows in a step."""

    steps = 0

    @ptrain.hookimpl(wrapper=True)
    def loss(self, run, batch):
        loss = yield
        factor = 1 + self.config.growth * self.steps
        return ptrain.Loss({name: factor * value for name, value in loss.sums.items()})

    @ptrain.hookimpl
    def on_step_end(self, run, result):
        self.steps += 1

    @ptrain.hookimpl
    def save_state(self, run):
        return {"steps": self.steps}

    @ptrain.hookimpl
    def load_state(self, run, state):
        self.steps = state["steps"]


# Parts


class SizeAlone(JsonLinesFiles):
    """Another file of the same size is the same to it."""

    def fingerprint(self):
        return [Path(self.config.path).stat().st_size]


class OfThisProcess(JsonLinesFiles):
    """Its fingerprint is another in each process."""

    def fingerprint(self):
        return [os.getpid(), Path(self.config.path).read_text()]


class NoJson(JsonLinesFiles):
    """Its fingerprint is a set."""

    def fingerprint(self):
        return {Path(self.config.path).read_text()}


class RawError(JsonLinesFiles):
    """What can't be read comes out as it is."""

    def load(self, run, split):
        Path(self.config.path).read_text().encode("ascii")
        return super().load(run, split)

    def fingerprint(self):
        return Path(self.config.path).read_bytes().hex()


class Listed(JsonLinesFiles):
    """Its rows are a list."""

    def load(self, run, split):
        return list(super().load(run, split))


class Broken(JsonLinesFiles):
    """It can't say what its rows are."""

    def fingerprint(self):
        return {}["nothing"]


class Unsaved(HuggingFaceTokenizer):
    """What it adds to the tokenizer is Python, which is not saved with it."""

    def create(self, run):
        made = super().create(run)

        class Lower(type(made)):
            def __call__(self, text, *rest, **more):
                return super().__call__(text[: len(text) // 2], *rest, **more)

        made.__class__ = Lower
        return made


class Everything(AdamW):
    """It takes frozen parameters too."""

    def create(self, run, model):
        import torch

        return torch.optim.AdamW(model.parameters(), lr=self.config.learning_rate, betas=self.config.betas)


class Negative(HFScheduler):
    """Its rate falls below 0."""

    def create(self, run, optimizer, total_steps):
        import torch

        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 2 * step / total_steps)


class Counting(HFScheduler):
    """Its rate depends on how often it was asked, which its state does not say."""

    def create(self, run, optimizer, total_steps):
        import torch

        asked = []

        def factor(step):
            asked.append(step)
            return 1 / (1 + len(asked))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class OtherMethod(HFScheduler):
    """Its method lacks an argument."""

    def create(self, run, optimizer):
        return super().create(run, optimizer, 10)


class Empty(ptrain.Checkpoint):
    """It saves nothing."""

    def save(self, run, path):
        pass


class Alone(DeepSpeedCheckpoint):
    """It can't be saved by several workers."""

    def save(self, run, path):
        if run.world > 1:
            raise NotImplementedError("one worker alone")
        super().save(run, path)


class Half(DeepSpeedCheckpoint):
    """The optimizer begins anew after a resume."""

    def load(self, run, path):
        super().load(run, path)
        for state in run.optimizer.state.values():
            state["exp_avg"].zero_()


class Fails(ptrain.Tracker):
    """It fails when it is given a value."""

    def log(self, run, metrics):
        raise ConnectionError("nobody listens")


class MeanOfWorkers(LossEvaluator):
    """The mean of each worker counts as one."""

    def evaluate(self, run):
        return {name: (total / max(count, 1), 1.0) for name, (total, count) in super().evaluate(run).items()}
