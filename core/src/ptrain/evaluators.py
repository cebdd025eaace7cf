"""The evaluators that ship with core: `loss` and `exact_match`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ptrain.errors import DataError, RecipeError
from ptrain.parts import Evaluator
from ptrain.recipe.sections import Count, EvaluatorConfig, Positive

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain.data.questions import Question
    from ptrain.run import Run


def with_data(run: Run) -> list[Evaluator]:
    """The evaluators of the recipe that have something to measure on: rows of `data`, or data of their own."""
    return [one for one in run.parts.evaluators if len(run.eval_data) or not one.needs_rows]


def run_evaluators(run: Run) -> dict[str, float]:
    """The metrics of every evaluator that has data: sums and counts added over the workers, divided once.

    Raises:
        RecipeError: those of two evaluators have one name.
    """
    from ptrain.engine import sum_over_workers

    found: dict[str, tuple[float, float]] = {}
    for evaluator in with_data(run):
        begin = f"{evaluator.config.name}/" if evaluator.config.name else ""
        measured = {begin + name: pair for name, pair in evaluator.evaluate(run).items()}
        if twice := found.keys() & measured.keys():
            raise RecipeError(
                f"two evaluators record `{min(twice)}`", fix="give an entry of `evaluation` a `name` of its own"
            )
        found.update(measured)
    flat = sum_over_workers([float(x) for pair in found.values() for x in pair], run.device)
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {name: (s / n if n else math.nan) for name, (s, n) in zip(found, pairs, strict=True)}


class LossEvaluator(Evaluator):
    """`loss`: the trainer's loss, a mean over all elements of the evaluation data."""

    class Config(EvaluatorConfig):
        """Keys of `loss`."""

    def evaluate(self, run: Run) -> Mapping[str, tuple[float, float]]:
        """This worker's sums and counts: of the loss, of each of its terms where there are several, of its metrics."""
        import torch

        from ptrain.stages import forward_loss, to_device

        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        metrics: dict[str, tuple[float, float]] = {}
        weights: Mapping[str, float] = {}
        with torch.no_grad():
            for batch in run.eval_loader:
                run.stop_if_asked()
                loss = forward_loss(run, to_device(batch, run.device))
                counted = {"samples": float(batch["rows"]), **run.call("count", batch=batch)}
                weights = loss.weights
                for term, value in loss.sums.items():
                    sums[term] = sums.get(term, 0.0) + float(value.double())
                    counts[term] = counts.get(term, 0.0) + float(counted[term])
                for name, (value, number) in loss.metrics.items():
                    before = metrics.get(name, (0.0, 0.0))
                    metrics[name] = (before[0] + float(value), before[1] + number)
        return {**_by_term(run, sums, counts, weights), **metrics}


def _by_term(
    run: Run, sums: Mapping[str, float], counts: Mapping[str, float], weights: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    if len(sums) == 1:
        (term,) = sums
        weight = weights.get(term, 1.0)
        return {"loss": (weight * sums[term], counts[term])}
    from ptrain.engine import sum_over_workers

    # A weighted sum of means needs the global counts first; every worker then adds its share.
    total = dict(zip(counts, sum_over_workers(list(counts.values()), run.device), strict=True))
    share = sum(weights.get(t, 1.0) * s / max(total[t], 1.0) for t, s in sums.items())
    return {"loss": (share, 1.0 / run.world), **{f"loss/{t}": (s, counts[t]) for t, s in sums.items()}}


class ExactMatch(Evaluator):
    """`exact_match`: generate the last assistant turn of each evaluation row, and compare the text."""

    class Config(EvaluatorConfig):
        """Keys of `exact_match`."""

        max_new_tokens: Positive = 64
        """The longest answer that is generated, in tokens."""
        batch_size: Positive = 32
        """Questions that one worker answers at a time."""
        count: Positive | None = None
        """Ask this many of the rows; by default all."""
        show: Count = 0
        """Print this many questions with the answers given and expected."""
        strip: bool = True
        """Ignore white space round the answers."""

    def check(self, run: Run, rows: Dataset) -> None:
        """Raise DataError where no row has a prompt, as with `data.mask_inputs: false`."""
        from ptrain.data.questions import questions

        if not questions(rows, 1):
            raise DataError(
                "the evaluation rows hold no question for `exact_match`: every token is supervised, or none is",
                fix="leave it out of `evaluation`, or set `data.mask_inputs: true`",
            )

    def evaluate(self, run: Run) -> Mapping[str, tuple[float, float]]:
        """This worker's number of right answers and of questions."""
        from ptrain.data.questions import questions

        asked = questions(run.eval_data, self.config.count)
        mine = asked[run.data_rank :: run.data_world]
        # Under ZeRO-3 every worker must generate equally often: short ones answer a question again, unscored.
        padded = mine + asked[: math.ceil(len(asked) / run.data_world) - len(mine)]
        right = 0.0
        for start in range(0, len(padded), self.config.batch_size):
            run.stop_if_asked()
            part = padded[start : start + self.config.batch_size]
            for at, (question, answer) in enumerate(zip(part, self._answers(run, part), strict=True), start):
                if at < len(mine):
                    correct = self._same(answer, question.expected(run.tokenizer))
                    right += correct
                    self._show(run, at, question, answer, correct)
        return {"exact_match": (right, float(len(mine)))}

    def _answers(self, run: Run, part: list[Question]) -> list[str]:
        from ptrain.model.generate import greedy

        stops = {question.answer[-1] for question in part}
        if isinstance(run.tokenizer.eos_token_id, int):
            stops.add(run.tokenizer.eos_token_id)
        made = run.engine(
            lambda: greedy(
                run.model, run.tokenizer, [question.prompt for question in part], self.config.max_new_tokens,
                run.device, sorted(stops), synchronised=run.engine.stage == 3,
            )
        )  # fmt: skip
        return [str(run.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in made]

    def _same(self, answer: str, expected: str) -> bool:
        return answer.strip() == expected.strip() if self.config.strip else answer == expected

    def _show(self, run: Run, at: int, question: Question, answer: str, correct: bool) -> None:
        if at < self.config.show:
            mark = "right" if correct else f"expected {json.dumps(question.expected(run.tokenizer))}"
            run.say(f"  {question.text(run.tokenizer)} -> {json.dumps(answer)} ({mark})")
