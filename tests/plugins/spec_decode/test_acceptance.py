"""Acceptance lengths against what is counted by hand and by a plain loop; the drafters without training."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from ptrain_spec_decode.acceptance import (
    NGram,
    PromptLookup,
    acceptance_length,
    accepted,
    baseline,
    drafts_taken,
    passes,
)


def test_hits_before_the_first_miss() -> None:
    hits = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    assert accepted(hits).tolist() == [3, 2, 1, 0, 0]
    total, count = acceptance_length(hits.view(1, 5, 3))
    assert (float(total), count) == (6 + 5, 5.0)


def test_no_positions() -> None:
    total, count = acceptance_length(torch.zeros(0, 3, dtype=torch.bool))
    assert (float(total), count) == (0.0, 0.0)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=20))
def test_like_a_loop(rows: list[list[bool]]) -> None:
    expected = 0
    for row in rows:
        expected += 1 + (row.index(False) if False in row else 3)
    total, count = acceptance_length(torch.tensor(rows, dtype=torch.bool).view(-1, 3))
    assert (float(total), count) == (expected, len(rows))


class Fixed:
    """Drafts the tokens from one place of a text on, right or wrong."""

    def __init__(self, drafts: dict[int, list[int]]) -> None:
        self.drafts = drafts

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        return self.drafts.get(len(tokens), [])[:count]


def test_passes_walk_over_what_was_taken() -> None:
    prompt, written = [7, 7], [10, 11, 12, 13, 14, 15]
    assert passes(Fixed({}), prompt, written, 3) == 6
    # After token 10 two drafts are right, so that the base's own 13 comes with them; then none is.
    assert passes(Fixed({3: [11, 12, 9], 7: [9]}), prompt, written, 3) == 4
    assert passes(Fixed({3: [11, 12, 13], 7: [15]}), prompt, written, 3) == 3
    assert passes(Fixed({3: [11, 12, 13], 7: [15]}), prompt, written, 1) == 5
    assert passes(Fixed({}), prompt, [10], 3) == 1


def test_ngram_takes_the_most_frequent_and_backs_off() -> None:
    drafter = NGram.of([[1, 2, 3, 1, 2, 3, 1, 2, 4]], order=3)
    assert drafter.draft([9, 1, 2], 3) == [3, 1, 2]
    assert drafter.draft([7, 3], 1) == [1]  # (7, 3) was never seen, 3 was
    assert drafter.draft([7], 1) == [1]  # 7 was never seen: 1 and 2 are as frequent, and 1 is the smaller
    assert NGram.of([], order=3).draft([1], 2) == []


def test_prompt_lookup_copies_the_newest_longest_match() -> None:
    assert PromptLookup().draft([5, 1, 2, 7, 8, 1, 2], 2) == [7, 8]
    assert PromptLookup().draft([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1) == [9]  # three tokens match before two do
    assert PromptLookup(longest=1).draft([4, 5, 4, 6, 4], 2) == [6, 4]
    assert PromptLookup().draft([1, 2, 3], 2) == []


def test_drafts_taken_like_a_loop() -> None:
    rng = random.Random(0)
    text = [rng.randrange(4) for _ in range(120)]
    drafter = NGram.of([text], order=2)
    found = drafts_taken(drafter, text, 3)
    assert len(found) == 120 - 4  # the last one drafts tokens 117 to 119
    for position, taken in enumerate(found):
        known = text[: position + 2]
        expected = 0
        while expected < 3 and drafter.draft(known, 1) == [text[len(known)]]:
            known.append(text[len(known)])
            expected += 1
        assert taken == expected
    assert baseline(drafter, [text], 3) == 1 + sum(found) / len(found)


def test_a_drafter_that_knows_the_text_is_always_right() -> None:
    text = [*range(10)] * 4
    assert baseline(NGram.of([text], order=2), [text], 3) == 4.0
    assert baseline(NGram.of([[0, 0]], order=2), [[1, 2, 3, 4, 5, 6]], 3) == 1.0
