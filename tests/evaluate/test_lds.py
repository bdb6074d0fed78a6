"""The linear datamodeling score on outcomes that are made up."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from distinfluence.errors import NonFiniteError, SettingError, ShapeError
from distinfluence.evaluate import (
    LinearDatamodelingScore,
    linear_datamodeling_score,
    random_subsets,
    remarks_on_baselines,
    seed_matched_score,
)
from distinfluence.evaluate.lds import MOST_SPLITS, _splits

RANDOM = np.random.default_rng(0)
SCORES = RANDOM.normal(size=(4, 30))
SUBSETS = RANDOM.random((20, 30)) < 0.5
TRUTH = SUBSETS @ SCORES.T
DRAWS = 50


def noisy(n_seeds: int, noise: float, seed: int = 0) -> NDArray[np.float64]:
    """Outcomes [s, r, n_test] of the true scores, with noise of each seed."""
    return TRUTH[:, None] + noise * np.random.default_rng(seed).normal(size=(20, n_seeds, 4))


def score(scores: object, outcomes: object) -> LinearDatamodelingScore:
    return linear_datamodeling_score(scores, SUBSETS, outcomes, n_draws=DRAWS)


def mean_spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Of two [s, n_test]."""
    return float(np.mean([spearmanr(a, b).statistic for a, b in zip(one.T, other.T, strict=True)]))


def test_scores_that_add_up_to_the_outcomes_are_worth_one() -> None:
    found = score(SCORES, 3 + 2 * TRUTH)
    np.testing.assert_allclose(found.by_query, 1)
    assert found.mean == pytest.approx(1) and found.standard_error == pytest.approx(0, abs=1e-6)
    figure = found.figure("exact")
    assert (figure.check, figure.value, figure.n_queries, figure.n_retrainings) == ("LDS", pytest.approx(1), 4, 20)
    assert figure.remark == "" and np.isnan(figure.ceiling) and figure.low == pytest.approx(1, abs=1e-6)


def test_scores_of_the_wrong_sign_are_negative_and_said_to_be() -> None:
    found = score(-SCORES, TRUTH)
    np.testing.assert_allclose(found.by_query, -1)
    assert found.figure("wrong", "does not beat random").remark == (
        "the scores have the wrong sign; does not beat random"
    )


def test_it_is_the_rank_correlation_with_ties() -> None:
    outcomes = np.round(RANDOM.normal(size=(20, 4)), 0)
    found = score(np.round(SCORES), outcomes)
    expected = [spearmanr(SUBSETS @ np.round(SCORES[query]), outcomes[:, query]).statistic for query in range(4)]
    np.testing.assert_allclose(found.by_query, expected)
    assert found.mean == pytest.approx(np.mean(expected))


def test_it_is_against_the_mean_over_seeds() -> None:
    outcomes = noisy(3, 4.0)
    one, other = score(SCORES, outcomes), score(SCORES, outcomes.mean(axis=1))
    assert one.mean == other.mean < 0.95 and np.array_equal(one.estimate.draws, other.estimate.draws)
    assert (one.n_retrainings, other.n_retrainings) == (60, 20)
    assert np.isnan([other.ceiling, other.attainable]).all()


@pytest.mark.parametrize("n_seeds", [2, 3, 4, 5])
def test_the_ceiling_is_what_half_of_the_seeds_predicts_of_the_others(n_seeds: int) -> None:
    outcomes = noisy(n_seeds, 4.0)
    found = []
    for first in itertools.combinations(range(n_seeds), n_seeds // 2):
        rest = [seed for seed in range(n_seeds) if seed not in first]
        found.append(mean_spearman(outcomes[:, list(first)].mean(axis=1), outcomes[:, rest].mean(axis=1)))
    assert score(SCORES, outcomes).ceiling == pytest.approx(np.mean(found))


@pytest.mark.parametrize("n_seeds", [9, 12])
def test_of_many_seeds_some_splits_are_drawn(n_seeds: int) -> None:
    splits = _splits(n_seeds, seed=0)
    halves = {frozenset((frozenset(each), frozenset(range(n_seeds)) - frozenset(each))) for each in splits}
    assert len(splits) == len(halves) == MOST_SPLITS and {len(each) for each in splits} == {n_seeds // 2}
    assert splits == _splits(n_seeds, seed=0) != _splits(n_seeds, seed=1)


@pytest.mark.parametrize(("n_seeds", "noise"), [(2, 1.0), (5, 1.0), (5, 3.0), (4, 6.0)])
def test_what_the_expected_outcome_reaches_is_estimated_from_the_ceiling(n_seeds: int, noise: float) -> None:
    random = np.random.default_rng(0)
    scores, subsets = random.normal(size=(100, 40)), random.random((100, 40)) < 0.5
    truth = subsets @ scores.T
    outcomes = truth[:, None] + noise * random.normal(size=(100, n_seeds, 100))
    found = linear_datamodeling_score(scores, subsets, outcomes, n_draws=2)
    assert found.ceiling < found.mean - 0.01  # scores without noise beat outcomes with it
    assert found.attainable == pytest.approx(found.mean, abs=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_scores_that_are_permuted_are_worth_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    shuffled = random.permuted(np.repeat(SCORES, 5, axis=0), axis=1)
    subsets = random.random((60, 30)) < 0.5
    outcomes = np.tile(subsets @ SCORES.T, (1, 5))[:, np.repeat(np.arange(4), 5)]
    found = linear_datamodeling_score(shuffled, subsets, outcomes, n_draws=200, seed=seed)
    assert abs(found.mean) < 4 * found.standard_error < 0.5
    assert "not distinguishable from 0" in found.figure("shuffled").remark


def test_queries_without_variation_do_not_count_and_are_reported() -> None:
    outcomes = TRUTH.copy()
    outcomes[:, 2] = 1.0
    found = score(SCORES, outcomes)
    assert np.isnan(found.by_query[2]) and found.mean == pytest.approx(1)
    figure = found.figure("exact")
    assert figure.n_queries == 3
    assert figure.remark == "1 of 4 queries do not count, with constant scores or outcomes"
    none = score(np.zeros((4, 30)), outcomes).figure("zero")
    assert np.isnan([none.value, none.low, none.standard_error]).all() and none.n_queries == 0


def test_sums_that_differ_by_rounding_alone_are_equal() -> None:
    subsets, random = random_subsets(1000, 20), np.random.default_rng(0)
    varied = random.normal(size=(4, 1000))
    outcomes = subsets @ varied.T
    for size, counted in ((1e-13, 0), (1e-6, 4)):  # sums of 500 of them are rounded at 1e-14 or so
        scores = 0.37 + size * varied
        assert len(np.unique(scores[0] @ subsets.T)) > 10
        found = linear_datamodeling_score(scores, subsets, outcomes, n_draws=DRAWS)
        assert found.correlations.n_counted == counted
    assert found.mean == pytest.approx(1)


def test_methods_are_compared_with_baselines_on_the_same_draws() -> None:
    outcomes = noisy(5, 1.0)
    noise = np.random.default_rng(1).normal(size=SCORES.shape)
    found = {
        "exact": score(SCORES, outcomes),
        "poor": score(SCORES + 2 * noise, outcomes),
        "same": score(SCORES, outcomes),
    }
    remarks = remarks_on_baselines({name: each.correlations for name, each in found.items()}, ["poor", "same"])
    assert remarks["exact"] == "does not beat same (difference 0.000 [0.000, 0.000])"


def test_a_seed_matched_score_is_the_mean_over_seeds_with_scores() -> None:
    random, outcomes = np.random.default_rng(2), noisy(3, 2.0)
    influences = {seed: SCORES + random.normal(size=SCORES.shape) for seed in (12, 10)}
    found = seed_matched_score(influences, SUBSETS, outcomes, [10, 11, 12], n_draws=DRAWS)
    expected = [mean_spearman(SUBSETS @ influences[seed].T, outcomes[:, place]) for seed, place in ((10, 0), (12, 2))]
    assert found.mean == pytest.approx(np.mean(expected))
    pairs = [(0, 1), (0, 2), (2, 0), (2, 1)]  # what another single seed predicts of seed 10 and of seed 12
    assert found.ceiling == pytest.approx(np.mean([mean_spearman(outcomes[:, i], outcomes[:, j]) for i, j in pairs]))
    assert np.isnan(found.attainable)
    single = [
        linear_datamodeling_score(influences[s], SUBSETS, outcomes[:, i], n_draws=DRAWS) for s, i in ((10, 0), (12, 2))
    ]
    np.testing.assert_allclose(
        found.correlations.draws, np.mean([each.correlations.draws for each in single], axis=0), atol=1e-6
    )
    figure = found.figure("cg")
    assert (
        figure.check == "LDS, seed-matched" and figure.n_retrainings == 60 and figure.low < figure.value < figure.high
    )


def test_scores_that_know_the_seed_exceed_the_ceiling_of_other_seeds() -> None:
    random = np.random.default_rng(3)
    own = {seed: SCORES + 2 * random.normal(size=SCORES.shape) for seed in range(3)}
    outcomes = np.stack([SUBSETS @ own[seed].T for seed in own], axis=1)
    matched = seed_matched_score(own, SUBSETS, outcomes, [0, 1, 2], n_draws=DRAWS)
    assert matched.mean == pytest.approx(1) and matched.ceiling < 0.6
    swapped = seed_matched_score({0: own[1], 1: own[2], 2: own[0]}, SUBSETS, outcomes, [0, 1, 2], n_draws=DRAWS)
    assert swapped.mean < 0.6


def test_too_few_subsets_or_queries_for_an_interval_are_named() -> None:
    with pytest.raises(SettingError, match=r"`subsets` must hold at least 8 subsets for an interval, got 7\. Retrain"):
        linear_datamodeling_score(SCORES, SUBSETS[:7], TRUTH[:7])
    with pytest.raises(SettingError, match=r"`subsets` must hold at least 8 subsets for an interval, got 7"):
        seed_matched_score({0: SCORES}, SUBSETS[:7], TRUTH[:7, None], [0])
    with pytest.raises(SettingError, match=r"`influences` must be about at least 2 queries for an interval, got 1"):
        linear_datamodeling_score(SCORES[:1], SUBSETS, TRUTH[:, :1])
    linear_datamodeling_score(SCORES[:2], SUBSETS[:8], TRUTH[:8, :2], n_draws=DRAWS)


def test_bad_shapes_and_numbers_are_refused() -> None:
    with pytest.raises(ShapeError, match="subsets"):
        score(SCORES[:, :-1], TRUTH)
    for outcomes in (TRUTH.T, TRUTH[None], TRUTH[:, 0], np.zeros((20, 0, 4))):
        with pytest.raises(ShapeError, match=r"`outcomes` must be \[20, 4\], subsets × test points, or \[20, r, 4\]"):
            score(SCORES, outcomes)
    with pytest.raises(NonFiniteError, match="influences"):
        score(SCORES * np.nan, TRUTH)
    with pytest.raises(NonFiniteError, match="outcomes"):
        score(SCORES, np.where(TRUTH.max() == TRUTH, np.inf, TRUTH))
    indices = np.stack([RANDOM.permutation(30) for _ in range(20)])
    with pytest.raises(SettingError, match="`subsets` must be booleans, got int64 other than 0 and 1"):
        linear_datamodeling_score(SCORES, indices, TRUTH)
    with pytest.raises(ShapeError, match=r"`influences` must be \[n_test, n_train\], got \[4\]"):
        score(SCORES[:, 0], TRUTH)


def test_scores_and_outcomes_of_seeds_must_belong_together() -> None:
    outcomes = noisy(2, 1.0)
    for influences, seeds in (({5: SCORES}, [0, 1]), ({}, [0, 1]), ({0: SCORES}, [0, 0])):
        with pytest.raises(SettingError, match="`influences_by_seed` must have scores for some of the different seeds"):
            seed_matched_score(influences, SUBSETS, outcomes, seeds)
    with pytest.raises(ShapeError, match=r"`outcomes` must be \[s, 3, n_test\].* got 2 seeds"):
        seed_matched_score({0: SCORES}, SUBSETS, outcomes, [0, 1, 2])
    with pytest.raises(ShapeError, match=r"one shape, got \[4, 30\] and \[3, 30\] for seed 1"):
        seed_matched_score({0: SCORES, 1: SCORES[:3]}, SUBSETS, outcomes, [0, 1])
