"""Measures beside trec_eval's own code and scipy's, on drawn rankings with ties and gaps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptrain_embed import metrics

pytestmark = pytest.mark.torch_free

CUTS = (1, 3, 10, 100)
IDS = st.text(alphabet="ab09é-", min_size=1, max_size=3)
TREC = {"ndcg": "ndcg_cut", "recall": "recall", "precision": "P", "map": "map_cut"}


@settings(max_examples=150)
@given(
    # Few different scores make many ties; ids decide them.
    run=st.dictionaries(IDS, st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.5 + 1e-9, 3.0]), min_size=1, max_size=30),
    grades=st.dictionaries(IDS, st.integers(-1, 3), min_size=1, max_size=12),
)
def test_retrieval_is_that_of_trec_eval(run: dict[str, float], grades: dict[str, int]) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval-terrier is not installed")
    wanted = {f"{name}.{','.join(map(str, CUTS))}" for name in TREC.values()}
    oracle = pytrec_eval.RelevanceEvaluator({"q": grades}, wanted | {"recip_rank", "map"}).evaluate({"q": run})["q"]
    found = metrics.retrieval(metrics.ranked(run), grades, CUTS)
    for name, theirs in TREC.items():
        for k in CUTS:
            assert found[f"{name}@{k}"] == pytest.approx(oracle[f"{theirs}_{k}"], abs=1e-6)
    # More than 30 documents are never ranked here.
    assert found["mrr@100"] == pytest.approx(oracle["recip_rank"], abs=1e-6)
    assert found["map@100"] == pytest.approx(oracle["map"], abs=1e-6)


def test_what_is_cut_off_does_not_count() -> None:
    ranking, grades = ["x", "y", "a"], {"a": 2, "b": 1}
    found = metrics.retrieval(ranking, grades, [2, 3])
    assert found["mrr@2"] == found["ndcg@2"] == found["recall@2"] == 0
    assert found["mrr@3"] == pytest.approx(1 / 3) and found["recall@3"] == 0.5
    assert found["ndcg@3"] == pytest.approx((2 / math.log2(4)) / (2 + 1 / math.log2(3)))
    assert metrics.retrieval(ranking, {}, [3]) == {f"{name}@3": 0.0 for name in metrics.NAMES}


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-1e3, 1e3, width=32)), min_size=2, max_size=40))
def test_correlations_are_those_of_scipy(pairs: list[tuple[int, float]]) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(metrics.spearman(x, y)) and math.isnan(metrics.pearson(x, y))
        return
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert np.array_equal(metrics.ranks(y), stats.rankdata(y))
    if np.std(y) > 1e-6 * np.abs(y).max():
        # Where all values are nearly the same, scipy itself warns that it is not exact.
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-6)
