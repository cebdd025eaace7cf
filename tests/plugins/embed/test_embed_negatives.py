"""Which documents are taken as hard negatives: beside a plain reading of the rules, and rule by rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ptrain_embed.negatives import Chosen, Mining, Query, Report, choose, cutoff

pytestmark = pytest.mark.torch_free


def rules(**keys: Any) -> Mining:
    """Settings with an output."""
    return Mining(output="mined.jsonl", **keys)


def plain(query: Query, found: list[tuple[int, float]], keys: Mining) -> Chosen | None:
    """The same for `sampling: top`, as one would say it."""
    positives = [(number, score) for number, score in found if number in query.positives][: keys.positives]
    if not positives:
        return None
    lowest = min(score for _, score in positives)
    taken = []
    for rank, (number, score) in enumerate(found):
        limited = number not in query.negatives and (keys.threshold is not None or keys.margin)
        if number in query.positives or number == query.text:
            continue
        if limited and score > np.float32(cutoff(lowest, keys)):
            continue
        if keys.ranks and not keys.ranks[0] <= rank < keys.ranks[1]:
            continue
        if keys.scores and not keys.scores[0] <= score <= keys.scores[1]:
            continue
        taken.append((number, score))
    taken = taken[: keys.negatives]
    if not taken or (keys.fewer == "drop" and len(taken) < keys.negatives):
        return None
    return Chosen([n for n, _ in positives], [n for n, _ in taken], [s for _, s in [*positives, *taken]])


@settings(max_examples=200)
@given(
    scores=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=14),
    positives=st.sets(st.integers(0, 9), max_size=4),
    negatives=st.sets(st.integers(0, 9), max_size=3),
    text=st.integers(-1, 9),
    keys=st.fixed_dictionaries(
        {},
        optional={
            "positives": st.sampled_from([1, 2, None]),
            "negatives": st.integers(1, 4),
            "threshold": st.sampled_from([0.5, 0.95, 1.0, None]),
            "margin": st.sampled_from([0.0, 0.2]),
            "ranks": st.sampled_from([(0, 5), (2, 9)]),
            "scores": st.sampled_from([(-0.5, 0.5), (0.0, 2.0)]),
            "fewer": st.sampled_from(["drop", "keep"]),
            "sampling": st.sampled_from(["top", "random"]),
        },
    ),
)
def test_as_the_rules_say(
    scores: list[float], positives: set[int], negatives: set[int], text: int, keys: dict[str, Any]
) -> None:
    made = rules(**keys)
    near = np.sort(np.array(scores, dtype=np.float32))[::-1]
    numbers = np.random.default_rng(0).permutation(len(scores))
    # The end of what was found: documents were fewer than asked for.
    found = np.append(numbers, -1), np.append(near, np.float32(-np.inf))
    query, report = Query(5, text, positives, negatives), Report()
    chosen = choose(query, *found, made, 42, report)
    pairs = list(zip(numbers.tolist(), near.tolist(), strict=True))
    wanted = plain(query, pairs, made)
    if made.sampling == "top" or chosen is None or wanted is None:
        assert chosen == wanted
    else:
        every = plain(query, pairs, made.model_copy(update={"negatives": 99, "fewer": "keep"}))
        assert every is not None and chosen.positives == wanted.positives
        assert set(chosen.negatives) <= set(every.negatives) and len(chosen.negatives) == len(wanted.negatives)
        assert chosen == choose(query, *found, made, 42, Report())
    # Nothing that was found is lost from the report.
    assert report.queries == 1 and report.found == report.thrown.total() + report.negatives
    assert report.dropped.total() == (chosen is None)


def test_the_share_of_a_score_below_zero_is_below_it() -> None:
    assert cutoff(0.8, rules()) == pytest.approx(0.76)
    assert cutoff(-0.8, rules()) == pytest.approx(-0.84)
    assert cutoff(0.8, rules(margin=0.1)) == pytest.approx(0.7)
    assert cutoff(0.8, rules(threshold=None, margin=0.1)) == pytest.approx(0.7)


def test_draws_differ_between_queries_and_seeds() -> None:
    numbers, near = np.arange(100), np.linspace(1, 0, 100, dtype=np.float32)
    made = rules(sampling="random", negatives=5)

    def drawn(key: int, seed: int) -> list[int]:
        chosen = choose(Query(key, -1, {0}, set()), numbers, near, made, seed, Report())
        assert chosen is not None
        return chosen.negatives

    assert len({tuple(drawn(key, seed)) for key in (1, -1, 2) for seed in (1, 2)}) == 6
    assert drawn(-(2**63), 1) == sorted(drawn(-(2**63), 1))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"ranks": (5, 5)}, "`ranks` is empty"),
        ({"scores": (0.5, 0.1)}, "`scores` is empty"),
        ({"ranks": (1000, 2000)}, "only 1000 documents are looked at"),
        ({"threshold": 1.5}, "less than or equal to 1"),
        ({"negative": 3}, "negative"),
    ],
)
def test_rules_that_can_not_be(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        rules(**keys)
