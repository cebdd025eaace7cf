"""Stage 2: an optimizer step on what the base itself writes after the beginnings of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

import ptrain
from ptrain_spec_decode.sampling import Generated, Warp, generate, uniforms
from ptrain_spec_decode.targets import IGNORED, with_targets

if TYPE_CHECKING:
    from ptrain import Batch, Run, StepResult


class Prompt(NamedTuple):
    """Where the base goes on from.

    Attributes:
        tokens: the prompt.
        row: the number of the row that it is of.
        piece: which piece of the row.
    """

    tokens: list[int]
    row: int
    piece: int


def generated_step(run: Run, batches: Sequence[Batch]) -> StepResult:
    """Generate from the rows of `batches`, then take one optimizer step on all that was generated."""
    return ptrain.stages.step(run, generated_batches(run, batches))


def generated_batches(run: Run, batches: Sequence[Batch]) -> list[Batch]:
    """Micro-batches of what the base writes, with the hidden states that made it write that.

    There are as many of them on every worker, and as many forward passes; one that has fewer rows gets micro-batches
    without any. What is written after a row depends on the recipe's seed, the step and the row, but for rounding: see
    `generate`.
    """
    config = run.config
    prompts = [prompt for batch in batches for prompt in prompts_of(batch, config.gen_prompt_length, pieces(run))]
    most = _most(run, len(prompts))
    written = _written(run, prompts, most)
    size = config.gen_train_micro_batch_size
    return [_batch(run, prompts[at : at + size], written, at) for at in range(0, most, size)]


def pieces(run: Run) -> int:
    """How many prompts a row is to give, so that a step has `gen_train_global_batch_size` of them.

    Raises:
        RecipeError: that is no multiple of the rows of a step, or workers share rows.
    """
    if run.data_world != run.world:
        raise ptrain.RecipeError(
            f"a plugin cuts sequences up over workers ({run.world} of them read {run.data_world} different rows), and "
            "`gen_train` needs whole rows to begin from",
            fix="leave that plugin out: generated sequences are short; or `ptrain spec-decode generate` them before",
        )
    wanted = run.config.gen_train_global_batch_size
    rows = run.recipe.micro_batch_size * run.accumulation * run.data_world
    if wanted is None:
        return 1
    if wanted % rows:
        raise ptrain.RecipeError(
            f"`gen_train_global_batch_size` is {wanted}, and a step has {rows} rows of text "
            f"({run.recipe.micro_batch_size} x {run.accumulation} x {run.data_world} workers)",
            expected="a multiple of that: every row gives as many prompts",
            fix=f"set it to {max(1, round(wanted / rows)) * rows}, or leave it out for a prompt a row",
        )
    return wanted // rows


def prompts_of(batch: Batch, length: int, count: int) -> list[Prompt]:
    """At most `count` prompts of each row: its documents cut into pieces of `length` tokens.

    What is left at the end of a document is none, unless the document is shorter than that altogether.
    """
    found: list[Prompt] = []
    for at in range(batch["rows"]):
        ids, begin, cut = batch["input_ids"][at].tolist(), 0, []
        for end in accumulate(batch["document_lengths"][at]):
            starts = range(begin, max(end - length, begin) + 1, length)
            cut += [ids[start : min(start + length, end)] for start in starts]
            begin = end
        row = int(batch["row_numbers"][at])
        found += [Prompt(tokens, row, piece) for piece, tokens in enumerate(cut[:count])]
    return found


def _written(run: Run, prompts: Sequence[Prompt], most: int) -> Generated:
    """What the base writes after each prompt, so many at a time, in as many passes on every worker."""
    config, mode = run.config, run.model.training
    warp = Warp(config.gen_temperature, config.gen_top_k)
    keys = [f"{run.progress.step}/{prompt.row}/{prompt.piece}" for prompt in prompts]
    draws = uniforms(run.recipe.seed, keys, config.gen_seq_length)
    parts: list[Generated] = []
    run.engine.train(False)
    for at in range(0, most, config.gen_micro_batch_size):
        own = slice(at, at + config.gen_micro_batch_size)
        # A worker without prompts left takes part with one that nobody learns from.
        asked = [prompt.tokens for prompt in prompts[own]] or [[0]]
        drawn = draws[own] if at < len(prompts) else torch.zeros(1, config.gen_seq_length, dtype=torch.float64)
        made = run.engine(lambda asked=asked, drawn=drawn: generate(run.model, asked, drawn, warp))
        parts += [made] if at < max(1, len(prompts)) else []
    run.engine.train(mode)
    return Generated(*map(torch.cat, zip(*parts, strict=True)))


def _batch(run: Run, prompts: Sequence[Prompt], written: Generated, first: int) -> Batch:
    """The micro-batch of the generated rows from `first` on, each after the last token of its prompt."""
    own = slice(first, first + max(1, len(prompts)))
    ids = torch.cat([written.last[own, None], written.tokens[own]], dim=1)
    hidden = written.hidden[own]
    labels = torch.nn.functional.pad(written.tokens[own], (0, 1), value=IGNORED)
    if not prompts:
        ids, hidden, labels = written.last[:1, None], written.hidden[:1, :0], torch.full_like(ids[:1, :1], IGNORED)
    rows, length = ids.shape
    batch: Batch = {
        "input_ids": ids,
        "shift_labels": labels,
        "position_ids": torch.arange(length, device=ids.device).expand(rows, length),
        "document_ids": torch.zeros_like(ids),
        "document_lengths": [[length] for _ in range(rows)],
        "rows": len(prompts),
        "split": "train",
        "row_numbers": [prompt.row for prompt in prompts],
        # At the last token there is none: nothing was generated after it, and nothing is learnt there.
        "hidden": torch.nn.functional.pad(hidden, (0, 0, 0, 1)),
    }
    return with_targets(batch, run.model.speculator.n_predict)  # type: ignore[union-attr]


def _most(run: Run, count: int) -> int:
    """The largest `count` of all workers, at least 1; every worker must ask."""
    if run.world == 1:
        return max(1, count)
    most = torch.tensor(max(1, count), device=run.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
