"""Checks of real runs: one worker, two workers, and resumed ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ptrain.testing.check import NotApplicable

if TYPE_CHECKING:
    from ptrain.testing.finished import Finished
    from ptrain.testing.study import Study

TOLERANCE = 1e-5
"""How far fp32 may differ where the same is added in another order; of norms, as a share."""
CUTS = {"1 x 4 on 1 worker": (1, 4, 1), "2 x 2 on 1 worker": (2, 2, 1), "2 x 1 on 2 workers": (2, 1, 2)}
"""`micro_batch_size`, `gradient_accumulation_steps` and workers; all are 4 rows a step, as the run compared with."""


def trains(study: Study) -> None:
    """A tiny recipe with it trains on CPU: every step has a finite loss, and the weights change."""
    from safetensors.torch import load_file

    study.ready()
    run = study.whole
    steps = study.recipe["train_iters"]
    if len(run.losses) != steps:
        raise study.wrong(f"{len(run.losses)} steps were recorded", expected=f"{steps}")
    for step, loss in enumerate(run.losses, 1):
        if not math.isfinite(loss):
            raise study.wrong(f"the loss of step {step} is {loss}", expected="a finite number")
    before = load_file(study.material.model / "model.safetensors")
    if all(name in before and before[name].equal(value) for name, value in run.weights.items()):
        raise study.wrong(f"no weight has changed after {steps} steps", expected="training to change some")


def batch(study: Study) -> None:
    """Losses, gradient norms and final weights do not depend on how a batch is cut up.

    What is divided within a micro-batch weighs its tokens by what happens to lie beside them; nobody sees it, and runs
    on another number of GPUs can't be compared. Core divides once, by what `count` says of the whole step.
    """
    expected = study.reference
    for name, (micro, accumulation, workers) in CUTS.items():
        found = study.run(
            name.replace(" ", "-"), workers=workers, micro_batch_size=micro, gradient_accumulation_steps=accumulation
        )
        compare(study, found, expected, f"with {name} (micro_batch_size x gradient_accumulation_steps)", TOLERANCE)


def resume(study: Study) -> None:
    """A run that was cut off and gone on with is the uninterrupted one, bit for bit: losses and final weights.

    What a plugin keeps from step to step has to be in `save_state`, and random numbers are to be drawn from torch's own
    generators, which are seeded for each step.
    """
    if study.kind == "checkpoint" and not study.cls.resumable:
        raise NotApplicable("training is not resumed from it")
    compare(study, study.resumed, study.reference, "after a resume", 0.0)


def compare(study: Study, found: Finished, expected: Finished, when: str, tolerance: float) -> None:
    """Raise PluginError for the first difference of two runs that is larger than `tolerance`."""
    for name in ("loss", "grad_norm"):
        for one, other in zip(found.metrics, expected.metrics, strict=True):
            value, wanted = one.get(name, 0.0), other.get(name, 0.0)
            allowed = tolerance * (max(1.0, abs(wanted)) if name == "grad_norm" else 1.0)
            if not abs(value - wanted) <= allowed:
                raise study.wrong(
                    f"`{name}` of step {one['step']} is {value!r} {when}", expected=_as(wanted, tolerance)
                )
    for name, wanted in expected.weights.items():
        difference = float((found.weights[name] - wanted).abs().max())
        if not difference <= tolerance:
            raise study.wrong(
                f"`{name}` differs by {difference:.2g} {when}, though losses do not",
                expected=_as("the same", tolerance),
            )


def _as(value: object, tolerance: float) -> str:
    how = f"to {tolerance:g}" if tolerance else "bit for bit"
    return f"{value!r} {how}, as of the uninterrupted run of one worker" if value != "the same" else f"the same {how}"
