"""Bootstrap draws are those of resampled arrays, and intervals cover what they should."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from distinfluence.errors import SettingError, ShapeError
from distinfluence.evaluate import PerQuery, remarks_on_baselines
from distinfluence.evaluate.statistics import (
    BLOCK,
    Estimate,
    correlation_draws,
    rank_correlations,
    resampled_counts,
    ties_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:An input array is constant")


def tied(n: int, m: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Related rows with many ties on both sides."""
    random = np.random.default_rng(seed)
    one = np.round(random.normal(size=(n, m)))
    return one, np.round(one + random.normal(size=(n, m)))


def counts_of(n: int, n_draws: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    return np.concatenate([counts for _, counts in resampled_counts(n, n_draws, seed)]).astype(np.int64)


@pytest.mark.parametrize("m", [2, 3, 9, 60])
def test_rank_correlations_are_those_of_scipy_with_ties(m: int) -> None:
    one, other = tied(20, m, m)
    expected = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(rank_correlations(ties_of(one), ties_of(other)), expected, rtol=0, atol=1e-12)


def test_the_draws_are_the_correlations_of_resampled_arrays() -> None:
    one, other = tied(4, 12, 0)
    other[3] = 1.0  # constant in every draw
    one[2, 1:] = 0.0  # constant in the draws without its first column
    draws = correlation_draws(ties_of(one), ties_of(other), 60, seed=5)
    expected = np.empty((60, 4))
    for draw, counts in enumerate(counts_of(12, 60, (5, 0))):
        chosen = np.repeat(np.arange(12), counts)
        for row in range(4):
            expected[draw, row] = spearmanr(one[row, chosen], other[row, chosen]).statistic
    assert 0 < np.isnan(expected[:, 2]).sum() < 60 and np.isnan(expected[:, 3]).all()
    np.testing.assert_allclose(draws, expected, rtol=0, atol=1e-6)


def test_the_mean_resamples_the_queries_that_count_and_skips_those_that_a_draw_leaves_constant() -> None:
    one, other = tied(6, 9, 1)
    other[4] = 0.0
    ties = ties_of(one), ties_of(other)
    found = PerQuery(rank_correlations(*ties), correlation_draws(*ties, 50, seed=3), 3)
    kept = [0, 1, 2, 3, 5]
    means = []
    for draw, counts in enumerate(counts_of(5, 50, (3, 1))):
        correlations = np.repeat(found.draws[draw, kept], counts)
        means.append(np.nanmean(correlations))
    mean = found.mean()
    assert found.n_counted == 5 and mean.value == pytest.approx(found.values[kept].mean())
    np.testing.assert_allclose(mean.draws, means, rtol=1e-6)
    assert (mean.low, mean.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=1e-6)
    assert mean.standard_error == pytest.approx(np.std(means, ddof=1), rel=1e-6)


def test_blocks_of_draws_are_small_and_draw_with_replacement() -> None:
    n = BLOCK // 3
    blocks = list(resampled_counts(n, 7, (0,)))
    assert [rows for rows, _ in blocks] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert all(counts.size <= BLOCK and (counts.sum(axis=1) == n).all() for _, counts in blocks)
    share = np.mean([(counts == 0).mean() for _, counts in blocks])
    assert share == pytest.approx(np.exp(-1), abs=0.01)  # of things that a draw misses


def test_the_same_seed_gives_the_same_draws_and_another_seed_others() -> None:
    first, second = (ties_of(each) for each in tied(3, 10, 2))
    one, again, other = (correlation_draws(first, second, 20, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, again, equal_nan=True) and not np.array_equal(one, other, equal_nan=True)


def test_a_bootstrap_over_queries_alone_has_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    mean = PerQuery.of(values, n_draws=2000).mean()
    expected = values.std() / np.sqrt(400)
    assert mean.standard_error == pytest.approx(expected, rel=0.1)
    assert (mean.low, mean.high) == pytest.approx(
        (mean.value - 1.96 * expected, mean.value + 1.96 * expected), abs=0.02
    )


def test_one_query_that_counts_has_no_interval() -> None:
    mean = PerQuery.of([np.nan, 0.5, np.nan]).mean()
    assert mean.value == 0.5 and np.isnan([mean.low, mean.high, mean.standard_error]).all()
    assert np.isnan(PerQuery.of([np.nan, np.nan]).mean().value)


def test_intervals_cover_the_truth() -> None:
    """Correlations vary by query, and all queries share the noise of the subsets, which a one-way bootstrap misses."""
    random, n_queries, n_subsets, trials = np.random.default_rng(0), 30, 40, 150
    truth = np.mean([6 / np.pi * np.arcsin(rho / 2) for rho in (0.3, 0.5, 0.7)])
    two_way, one_way = 0, 0
    for _ in range(trials):
        rho = random.choice([0.3, 0.5, 0.7], size=(n_queries, 1))
        common = random.normal(size=(2, 1, n_subsets))
        one, noise = np.sqrt(0.5) * (common + random.normal(size=(2, n_queries, n_subsets)))
        ties = ties_of(one), ties_of(rho * one + np.sqrt(1 - rho**2) * noise)
        values = rank_correlations(*ties)
        both = PerQuery(values, correlation_draws(*ties, 100, 0), 0).mean()
        queries = PerQuery.of(values, n_draws=100).mean()
        two_way += both.low <= truth <= both.high
        one_way += queries.low <= truth <= queries.high
    assert two_way / trials >= 0.88
    assert one_way / trials < 0.8


def test_a_method_beats_a_baseline_if_the_paired_interval_is_above_zero() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(0.5, 0.3, 50)  # the spread of queries is common to all and cancels in pairs
    values = {
        "good": PerQuery.of(hard + 0.05 + random.normal(0, 0.02, 50)),
        "same": PerQuery.of(hard + random.normal(0, 0.02, 50)),
        "gradient dot": PerQuery.of(hard),
        "BM25": PerQuery.of(np.where(np.arange(50) < 45, np.nan, hard + 1)),
    }
    remarks = remarks_on_baselines(values, ["gradient dot"])
    assert remarks["good"] == "" and remarks["gradient dot"] == "baseline"
    assert remarks["same"].startswith("does not beat gradient dot (difference ")
    both = remarks_on_baselines(values, ["gradient dot", "BM25"])
    assert both["good"].startswith("does not beat BM25 (difference -0.9") and "gradient dot" not in both["good"]
    assert "gradient dot" in both["same"] and "BM25" in both["same"] and both["BM25"] == "baseline"


def test_a_baseline_that_shares_no_query_is_not_beaten() -> None:
    values = {"method": PerQuery.of([1.0, 1.0, np.nan, np.nan]), "BM25": PerQuery.of([np.nan, np.nan, 0.0, 0.0])}
    assert remarks_on_baselines(values, ["BM25"])["method"].startswith("does not beat BM25")


def test_draws_that_are_not_paired_are_refused() -> None:
    values = [0.1, 0.2, 0.3]
    for other in (PerQuery.of(values, seed=1), PerQuery.of(values, n_draws=5), PerQuery.of(values[:2])):
        with pytest.raises(SettingError, match="`n_draws` and `seed`"):
            PerQuery.of(values).minus(other)
    with pytest.raises(SettingError, match=r"`baselines` must be names in `values`, got \['loss'\]"):
        remarks_on_baselines({"method": PerQuery.of(values)}, ["loss"])


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(SettingError, match=r"`values` must be about at least 2 queries for an interval, got 1"):
        PerQuery.of([1.0])
    with pytest.raises(ShapeError, match=r"`values` must be \[n_test\]"):
        PerQuery.of([[1.0, 2.0]])
    with pytest.raises(SettingError, match="`n_draws` must be at least 2, got 1"):
        PerQuery.of([1.0, 2.0], n_draws=1)


def test_a_figure_has_the_interval() -> None:
    figure = Estimate(0.5, np.linspace(0, 1, 1001)).figure("LDS", "cg", n_queries=3, remark="small")
    assert (figure.low, figure.high) == pytest.approx((0.025, 0.975))
    assert figure.standard_error == pytest.approx(0.289, abs=1e-3) and np.isnan(figure.ceiling)
    assert str(figure) == "LDS, cg: 0.500 [0.025, 0.975] (small)"
