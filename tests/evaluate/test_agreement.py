"""Agreement of rankings, query by query."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from distinfluence.errors import SettingError, ShapeError
from distinfluence.evaluate import rank_agreement

RANDOM = np.random.default_rng(0)
ONE = RANDOM.normal(size=(15, 40))
METHODS = {"one": ONE, "near": ONE + 0.3 * RANDOM.normal(size=ONE.shape), "opposite": -ONE}


def test_every_pair_has_its_rank_correlation_and_overlap() -> None:
    found = rank_agreement(METHODS, k=5, n_draws=50)
    assert [(each.first, each.second) for each in found] == [("one", "near"), ("one", "opposite"), ("near", "opposite")]
    for each in found:
        for query in range(15):
            a, b = METHODS[each.first][query], METHODS[each.second][query]
            assert each.correlation.values[query] == pytest.approx(spearmanr(a, b).statistic)
            common = set(np.argsort(-a)[:5].tolist()) & set(np.argsort(-b)[:5].tolist())
            assert each.overlap.values[query] == pytest.approx(len(common) / 5)
    correlation, overlap = found[0].figures()
    assert (correlation.check, correlation.method, correlation.n_queries) == ("rank agreement", "one, near", 15)
    assert correlation.low < correlation.value < correlation.high and correlation.remark == ""
    assert (overlap.check, overlap.remark) == ("overlap of the top 5", "chance 0.125")


def test_methods_that_only_tie_do_not_agree() -> None:
    flat = np.zeros_like(ONE)
    flat[0, 0] = 1.0
    (found,) = rank_agreement({"flat": flat, "flat again": flat}, k=4, n_draws=10)
    assert np.isnan(found.correlation.values[1:]).all() and found.correlation.values[0] == pytest.approx(1)
    np.testing.assert_allclose(found.overlap.values[1:], 4 / 40)  # as for random rankings
    assert found.figures()[0].remark == "14 of 15 queries do not count, with constant scores"
    assert np.isnan(found.figures()[0].low)


def test_bad_input_is_named() -> None:
    with pytest.raises(SettingError, match=r"at least 2 methods to compare, got \['one'\]"):
        rank_agreement({"one": ONE})
    with pytest.raises(ShapeError, match=r"one shape, got \{'one': \(15, 40\), 'few': \(14, 40\)\}"):
        rank_agreement({"one": ONE, "few": ONE[1:]})
    with pytest.raises(SettingError, match="`k` must be from 1 to n_train=40, got 41"):
        rank_agreement(METHODS, k=41)
    with pytest.raises(SettingError, match="`influences` must be about at least 2 queries for an interval, got 1"):
        rank_agreement({name: scores[:1] for name, scores in METHODS.items()})
