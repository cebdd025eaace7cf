"""Decoding, plain and speculative: what a speculator drafts, the base checks in one forward pass.

Source of sampling: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; of trees: Miao
et al. 2024, "SpecInfer".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ptrain_spec_decode.cached import Cached, check_trees
from ptrain_spec_decode.candidates import draft

if TYPE_CHECKING:
    from ptrain_spec_decode.sampling import Choice, Warp
    from ptrain_spec_decode.speculator import Speculator

ROUNDING = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far logits may be apart that are computed for one token or for several at once, as a share of the largest one."""
EXACT = (torch.float64, torch.float32)
"""Where two logits are rarely that close, so that it costs little to look again."""


@dataclass
class Written:
    """What was written, and how.

    Attributes:
        tokens: the new ones, up to the first stop token.
        passes: forward passes of the base, that over the prompt among them.
        taken: of each pass that checked drafts, how many tokens it took from them.
        near_ties: which of the tokens were chosen among two that rounding could swap.
        seconds: of wall-clock time.
    """

    tokens: list[int] = field(default_factory=list)
    passes: int = 0
    taken: list[int] = field(default_factory=list)
    near_ties: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Limit:
    """Where a text ends.

    Attributes:
        tokens: the most new ones.
        stop: tokens that end it, and belong to it.
    """

    tokens: int
    stop: Collection[int] = ()

    def reached(self, written: Written) -> bool:
        """Whether the text is at its end; what goes beyond it is cut."""
        tokens = written.tokens
        end = next((at + 1 for at, token in enumerate(tokens) if token in self.stop), self.tokens)
        del tokens[min(end, self.tokens) :]
        return len(tokens) >= min(end, self.tokens)

    def room(self, written: Written) -> int:
        """How many drafts still make sense: each pass yields a token of the base's own besides."""
        return self.tokens - len(written.tokens) - 1


def greedy(base: Cached, prompt: Sequence[int], limit: Limit) -> Written:
    """Plain greedy decoding: a forward pass for each token."""
    return _plain(base, prompt, limit, lambda logits: int(logits.argmax()))


def sample(base: Cached, prompt: Sequence[int], limit: Limit, warp: Warp, draws: Iterator[float]) -> Written:
    """Plain sampling: a forward pass and a draw from [0, 1) for each token."""
    return _plain(base, prompt, limit, lambda logits: _drawn(warp(logits), draws))


def _plain(base: Cached, prompt: Sequence[int], limit: Limit, choose: Callable[[torch.Tensor], int]) -> Written:
    with _timed(base) as written:
        written.tokens.append(choose(base.read(prompt, last=True).logits[-1]))
        while not limit.reached(written):
            written.tokens.append(choose(base.read(written.tokens[-1:]).logits[-1]))
    return written


def speculative_greedy(
    base: Cached,
    speculator: Speculator,
    prompt: Sequence[int],
    limit: Limit,
    top_k: Sequence[int],
    paths: int | None = None,
    exact: bool | None = None,
) -> Written:
    """Greedy decoding with drafts: token for token what `greedy` writes, whatever is drafted.

    Several tokens at once are computed in another order than one, so the logits differ by rounding. Where the two
    largest are so close that this could swap them, the base reads what it has written since the last such place once
    more, one token at a time, as `greedy` does, and chooses then.

    Args:
        top_k: candidates of each head, below each candidate of the head before; all 1 for a chain.
        paths: check only the so many likeliest paths through them.
        exact: look again at near ties; by default in fp32 and fp64. In half precision they are frequent, and only
            counted: a token may be another one there.

    Raises:
        ModelError: the model can't take back what it has read, or can't read a tree.
    """
    if max(top_k) > 1:
        check_trees(base.model, len(prompt) + limit.tokens)
    exact = base.model.dtype in EXACT if exact is None else exact
    with _timed(base) as written:
        found = base.read(prompt, last=True)
        hidden, token, sure = found.hidden[-1], int(found.logits[-1].argmax()), len(prompt)
        written.tokens.append(token)
        while not limit.reached(written):
            tree = draft(speculator, hidden, token, top_k[: limit.room(written)], paths)
            seen = None if tree.is_chain else tree.seen()
            found = base.read(tree.tokens, tree.depths, seen)
            values, choices = found.logits.topk(2)
            path = tree.path(choices[:, 0].tolist())
            close = _near_ties(values, path)
            if close:
                close = close[:1] if exact else close
                written.near_ties += [len(written.tokens) + place for place in close]
                path = path[: close[0] + 1] if exact else path
            base.keep(len(tree.tokens), path)
            hidden, token = found.hidden[path[-1]], int(choices[path[-1], 0])
            taken = [tree.tokens[at] for at in path[1:]]
            if close and exact:
                hidden, token = _again(base, [*prompt, *written.tokens, *taken], sure)
                sure = base.length
            written.tokens += [*taken, token]
            if len(tree.tokens) > 1:
                written.taken.append(len(taken))
    return written


def _near_ties(values: torch.Tensor, path: Sequence[int]) -> list[int]:
    """At which places of a path the two largest logits, [n, 2], are closer than rounding."""
    gaps = (values[:, 0] - values[:, 1]) <= ROUNDING[values.dtype] * values.abs().amax(-1)
    close = gaps.tolist()
    return [place for place, at in enumerate(path) if close[at]]


def _again(base: Cached, tokens: Sequence[int], sure: int) -> tuple[torch.Tensor, int]:
    """The hidden state and the choice after `tokens`, of which all from `sure` on are read once more, one by one."""
    base.forget(base.length - sure)
    for token in tokens[sure:-1]:
        base.read([token])
    found = base.read(tokens[-1:])
    return found.hidden[-1], int(found.logits[-1].argmax())


def speculative_sample(
    base: Cached,
    speculator: Speculator,
    prompt: Sequence[int],
    limit: Limit,
    warp: Warp,
    draws: Iterator[float],
) -> Written:
    """Sampling with a chain of drafts, whose text has the distribution of what `sample` writes.

    Args:
        draws: from [0, 1), three for each token at the most.
    """
    with _timed(base) as written:
        found = base.read(prompt, last=True)
        hidden, token = found.hidden[-1], _drawn(warp(found.logits[-1]), draws)
        written.tokens.append(token)
        while not limit.reached(written):
            drafted, guesses = _sampled_chain(speculator, hidden, token, warp, draws, limit.room(written))
            found = base.read([token, *drafted])
            real = warp(found.logits).dense(found.logits.shape[-1])
            taken, token = accept(real, guesses, drafted, draws)
            base.keep(len(drafted) + 1, range(taken + 1))
            hidden = found.hidden[taken]
            written.tokens += [*drafted[:taken], token]
            if drafted:
                written.taken.append(taken)
    return written


def _sampled_chain(
    speculator: Speculator, hidden: torch.Tensor, token: int, warp: Warp, draws: Iterator[float], room: int
) -> tuple[list[int], list[torch.Tensor]]:
    """Tokens drawn from the heads in turn, and the distribution [v] that each was drawn from."""
    drafted: list[int] = []
    guesses: list[torch.Tensor] = []
    with torch.no_grad():
        state, last = speculator.begin(hidden), torch.tensor(token, device=hidden.device)
        for at in range(min(speculator.n_predict, room)):
            state = speculator.advance(state, last, at)
            choice = warp(speculator.head(at)(state.hidden).float())
            drafted.append(_drawn(choice, draws))
            guesses.append(choice.dense(speculator.vocab_size))
            last = torch.tensor(drafted[-1], device=hidden.device)
    return drafted, guesses


def accept(
    real: torch.Tensor, guesses: Sequence[torch.Tensor], drafted: Sequence[int], draws: Iterator[float]
) -> tuple[int, int]:
    """How many drafts are taken, and the token after them, so that all have the distribution `real`.

    A draft x is taken with the probability min(1, real(x) / guess(x)). After the first that is not, the token is drawn
    from what of `real` the guess left, max(0, real - guess).

    Args:
        real: what the base says after the root and after each draft, [n + 1, v].
        guesses: what each draft was drawn from, [v].
    """
    for at, (token, guess) in enumerate(zip(drafted, guesses, strict=True)):
        if next(draws) * float(guess[token]) < float(real[at, token]):
            continue
        rest = (real[at] - guess).clamp(min=0)
        return at, _index(rest if rest.sum() > 0 else real[at], draws)
    return len(drafted), _index(real[len(drafted)], draws)


def _index(weights: torch.Tensor, draws: Iterator[float]) -> int:
    from ptrain_spec_decode.sampling import Choice

    return _drawn(Choice(torch.arange(len(weights), device=weights.device), weights), draws)


def _drawn(choice: Choice, draws: Iterator[float]) -> int:
    drawn = torch.tensor(next(draws), dtype=torch.float64, device=choice.tokens.device)
    return int(choice.draw(drawn))


@contextmanager
def _timed(base: Cached) -> Iterator[Written]:
    """Within it, a text is written: its passes and its time are counted."""
    written, before, began = Written(), base.passes, _now(base)
    yield written
    written.seconds, written.passes = _now(base) - began, base.passes - before


def _now(base: Cached) -> float:
    if base.model.device.type == "cuda":
        torch.cuda.synchronize(base.model.device)
    return time.perf_counter()
