"""The evaluator `speculative`: decoding with the heads as they are now, beside plain decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, model_validator

import ptrain

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain import Run
    from ptrain_spec_decode.decode import Limit, Written
    from ptrain_spec_decode.speculator import Speculator

Positive = Annotated[int, Field(ge=1)]
WARM_UP = 4
"""Tokens that are written before time is taken: the first passes of a process are slower."""


class Speculative(ptrain.Evaluator):
    """`speculative`: write on from the prompts of evaluation rows, with drafts of the speculator and without.

    A prompt is what stands before the last answer of a conversation; of text, it is the beginning.
    """

    class Config(ptrain.EvaluatorConfig):
        """Keys of `speculative`."""

        count: Positive = 16
        """How many evaluation rows give a prompt."""
        prompt_length: Positive = 64
        """Tokens of the prompt that is taken of a row without a question; of a shorter row, its first half."""
        max_new_tokens: Positive = 128
        """The longest text that is written, in tokens."""
        candidates: list[Positive] | None = None
        """How many tokens each head proposes below each one of the head before, such as `[5, 4, 3]`: a tree, which is
        checked in one forward pass. By default one for every head of the speculator: a chain."""
        paths: Positive | None = None
        """Of a tree, check only the so many likeliest paths."""
        temperature: Annotated[float, Field(ge=0)] = 0.0
        """0 decodes greedily; above it texts are sampled, with a chain."""
        top_k: Annotated[int, Field(ge=0)] = 0
        """With a temperature: sample from so many of the likeliest tokens; 0 is all of them."""

        @model_validator(mode="after")
        def _samples_with_a_chain(self) -> Any:
            if self.temperature and max(self.candidates or [1]) > 1:
                raise ValueError("sampling takes a chain: `temperature` can't be used with several `candidates`")
            if self.top_k and not self.temperature:
                raise ValueError("`top_k` needs a `temperature`: without one, decoding is greedy")
            return self

    def check(self, run: Run, rows: Dataset) -> None:
        """Raise DataError where no row gives a prompt."""
        limit = _positions(run)
        if not prompts(rows, 1, self.config.prompt_length, limit):
            raise ptrain.DataError(
                "no evaluation row gives a prompt for `speculative`",
                expected=f"rows of two tokens and more, with a prompt that leaves room in {limit:,} positions",
            )

    def evaluate(self, run: Run) -> Mapping[str, tuple[float, float]]:
        """This worker's sums: tokens by passes, of drafts and of prompt lookup, and the seconds of both ways to write.

        Raises:
            ModelError: the model has no speculator, or can't decode with it.
            TrainingError: the text is another one than that of plain greedy decoding.
        """
        speculator = _speculator(run)
        self._check(speculator)
        asked = prompts(run.eval_data, self.config.count, self.config.prompt_length, _positions(run))
        mine = asked[run.data_rank :: run.data_world]
        together = Together(run)
        pairs: list[Pair] = []
        for at in range(-(-len(asked) // run.data_world)):
            run.stop_if_asked()
            prompt = mine[at] if at < len(mine) else None
            run.engine(lambda prompt=prompt: self._both(run, speculator, together, prompt, pairs))
        return metrics(pairs, speculator.n_predict)

    def _check(self, speculator: Speculator) -> None:
        top_k = self.config.candidates or []
        if len(top_k) > speculator.n_predict or max(top_k, default=0) > speculator.vocab_size:
            raise ptrain.ModelError(
                f"`candidates: {top_k}` of the evaluator `speculative` does not fit the speculator",
                expected=f"at most {speculator.n_predict} numbers up to {speculator.vocab_size}: one for each head",
            )

    def _both(
        self, run: Run, speculator: Speculator, together: Together, prompt: list[int] | None, pairs: list[Pair]
    ) -> None:  # fmt: skip
        """Write on from `prompt` in both ways, and wait for the other workers."""
        if prompt is not None:
            writer = Writer(run, self.config, speculator, together)
            if not pairs:
                writer.pair(prompt, WARM_UP)
            pairs.append(writer.pair(prompt, self.config.max_new_tokens))
        together.wait()


class Writer:
    """Writes on from prompts, plainly and with drafts."""

    def __init__(self, run: Run, config: Any, speculator: Speculator, together: Together) -> None:
        from ptrain_spec_decode.sampling import Warp

        self._run, self._config, self._speculator, self._together = run, config, speculator, together
        self._warp = Warp(config.temperature, config.top_k)
        self._stop = stop_tokens(run)

    def pair(self, prompt: list[int], count: int) -> Pair:
        """What plain decoding writes, and what speculative decoding does.

        Raises:
            TrainingError: they differ where they must not.
        """
        from ptrain_spec_decode.decode import Limit

        limit = Limit(min(count, _positions(self._run) - len(prompt)), self._stop)
        plain, drafted = self._plain(prompt, limit), self._drafted(prompt, limit)
        if not self._config.temperature:
            check_same(plain, drafted, prompt)
        return Pair(prompt, plain, drafted)

    def _plain(self, prompt: list[int], limit: Limit) -> Written:
        from ptrain_spec_decode import decode

        if self._config.temperature:
            return decode.sample(self._base(), prompt, limit, self._warp, self._draws(prompt))
        return decode.greedy(self._base(), prompt, limit)

    def _drafted(self, prompt: list[int], limit: Limit) -> Written:
        from ptrain_spec_decode import decode

        if self._config.temperature:
            draws = self._draws(prompt)
            return decode.speculative_sample(self._base(), self._speculator, prompt, limit, self._warp, draws)
        top_k = self._config.candidates or [1] * self._speculator.n_predict
        return decode.speculative_greedy(self._base(), self._speculator, prompt, limit, top_k, self._config.paths)

    def _base(self) -> Any:
        from ptrain_spec_decode.cached import Cached

        return Cached(self._run.model, self._together.passing)

    def _draws(self, prompt: Sequence[int]) -> Iterator[float]:
        import numpy as np

        from ptrain.seeds import derived_seed

        generator = np.random.default_rng(derived_seed(self._run.recipe.seed, "speculative", *prompt))
        while True:
            yield generator.random()


class Together:
    """Keeps workers that share the weights of a model (ZeRO-3) together: each makes as many forward passes as the
    busiest one."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._needed = run.engine.stage == 3 and run.world > 1

    def passing(self) -> None:
        """Called before each forward pass."""
        self._anybody(True)

    def wait(self) -> None:
        """Called when this worker is done: it goes on with empty passes until all are."""
        from ptrain_spec_decode.cached import Cached

        while self._anybody(False):
            Cached(self._run.model).read([0])

    def _anybody(self, active: bool) -> bool:
        if not self._needed:
            return False
        import torch

        flag = torch.tensor(float(active), device=self._run.device)
        torch.distributed.all_reduce(flag)
        return bool(flag > 0)


class Pair(NamedTuple):
    """A prompt, and what was written after it plainly and with drafts."""

    prompt: list[int]
    plain: Written
    drafted: Written


def metrics(pairs: Sequence[Pair], heads: int) -> dict[str, tuple[float, float]]:
    """`(sum, count)` by name; `heads` drafts are made at a time."""
    from ptrain_spec_decode.acceptance import PromptLookup, passes

    drafted = [one.drafted for one in pairs]
    tokens = float(sum(len(one.tokens) for one in drafted))
    checks = [taken for one in drafted for taken in one.taken]
    # Samples are different texts: what counts is the time for a token.
    plain = sum(one.plain.seconds / len(one.plain.tokens) * len(one.drafted.tokens) for one in pairs)
    lookup = sum(passes(PromptLookup(), one.prompt, one.drafted.tokens, heads) for one in pairs)
    return {
        "speculative/tokens_per_pass": (tokens, float(sum(one.passes for one in drafted))),
        "speculative/acceptance_length": (float(sum(checks) + len(checks)), float(len(checks))),
        "speculative/prompt_lookup": (tokens, float(lookup)),
        "speculative/speed_up": (plain, sum(one.seconds for one in drafted)),
        "speculative/near_ties": (float(sum(len(one.near_ties) for one in drafted)), tokens),
    }


def check_same(plain: Written, drafted: Written, prompt: Sequence[int]) -> None:
    """Raise TrainingError where the first token that differs was not chosen among two that rounding could swap.

    In fp32 those are chosen as plain decoding does, so that no token differs at all.
    """
    if plain.tokens == drafted.tokens:
        return
    pairs = zip(plain.tokens, drafted.tokens, strict=False)
    first = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    if first is None or first not in drafted.near_ties:
        at = len(plain.tokens) if first is None else first
        raise ptrain.TrainingError(
            f"speculative decoding wrote another text than plain greedy decoding: they differ at token {at + 1} after "
            f"the prompt {list(prompt)[:8]}...",
            expected="the same text, token for token",
            fix="report this with the model's name; leave `speculative` out of `evaluation` until then",
        )


def prompts(rows: Any, count: int, length: int, positions: int) -> list[list[int]]:
    """The first `count` prompts of token rows: what comes before the last answer, or the first `length` tokens.

    Args:
        positions: that the model has; a prompt that leaves no room for a token is left out.
    """
    from ptrain.data.questions import documents, last_turn

    found: list[list[int]] = []
    for row in rows:
        for ids, labels in documents(row):
            question = last_turn(ids, labels)
            prompt = question.prompt if question is not None else ids[: min(length, len(ids) // 2)]
            if 0 < len(prompt) < positions:
                found.append([int(token) for token in prompt])
            if len(found) == count:
                return found
    return found


def stop_tokens(run: Run) -> set[int]:
    """What ends a text: EOS of the tokenizer, and what the model's own settings for generation say."""
    generation = getattr(run.model, "generation_config", None)
    given = [run.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
    return {token for one in given for token in (one if isinstance(one, list) else [one]) if isinstance(token, int)}


def _positions(run: Run) -> int:
    return getattr(run.hf_config.get_text_config(), "max_position_embeddings", None) or 2**31


def _speculator(run: Run) -> Speculator:
    """The speculator of the model; where ZeRO shards it, a whole copy, so that only the base is gathered in passes."""
    own: Any = getattr(run.model, "speculator", None)
    if own is None:
        raise ptrain.ModelError(
            "the evaluator `speculative` needs a model with a speculator",
            fix="leave it out of `evaluation`, or train with `type: spec-decode`",
        )
    if run.engine.stage != 3:
        return own
    from ptrain.weights import whole
    from ptrain_spec_decode.speculator import make

    copy = make(own.shape).to(run.device)
    for parameter, mine in zip(own.parameters(), copy.parameters(), strict=True):
        mine.data = whole(parameter).detach().clone()
    return copy
