"""Rank correlations, slopes and errors of drawn rows and columns, against SciPy on the matrices that the draws make."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from distinfluence.evaluate import Figure
from distinfluence.evaluate.checks.effects import Comparison, interval, split_half_spearman, spread_points

GENERATOR = np.random.default_rng(0)
PREDICTED = GENERATOR.normal(size=(7, 11)).round(1)  # some are equal
MEASURED = PREDICTED * 0.5 + GENERATOR.normal(size=(7, 11)).round(1)
COMPARISON = Comparison.drawn(PREDICTED, MEASURED, seed=0)


def drawn(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Both matrices with the rows and columns of a draw, as often as they were drawn."""
    rows = np.repeat(np.arange(7), COMPARISON.row_counts[number].astype(int))
    columns = np.repeat(np.arange(11), COMPARISON.column_counts[number].astype(int))
    assert (len(rows), len(columns)) == (7, 11)
    return PREDICTED[np.ix_(rows, columns)], MEASURED[np.ix_(rows, columns)]


@pytest.mark.parametrize("number", [0, 1, 2, 77, 2000])
def test_every_draw_is_the_statistic_of_the_drawn_matrices(number: int) -> None:
    a, b = drawn(number)
    expected = np.mean([spearmanr(one, other).statistic for one, other in zip(a, b, strict=True)])
    assert COMPARISON.mean_spearman()[number] == pytest.approx(expected)
    centred_a, centred_b = (each - each.mean(axis=1, keepdims=True) for each in (a, b))
    assert COMPARISON.slope()[number] == pytest.approx((centred_a * centred_b).sum() / (centred_a**2).sum())
    assert COMPARISON.relative_error()[number] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_the_first_draw_is_the_matrices_themselves_and_others_are_not() -> None:
    np.testing.assert_array_equal(drawn(0), (PREDICTED, MEASURED))
    assert len(np.unique(COMPARISON.column_counts, axis=0)) > 1900


def test_rows_that_are_constant_have_no_say() -> None:
    flat = PREDICTED.copy()
    flat[2] = 3.0
    others = [i for i in range(7) if i != 2]
    expected = np.mean([spearmanr(PREDICTED[i], MEASURED[i]).statistic for i in others])
    draws = Comparison.drawn(flat, MEASURED, seed=0).mean_spearman()
    assert draws[0] == pytest.approx(expected)
    assert np.isfinite(draws).all()


def test_intervals_cover_the_truth_and_narrow_with_more_points() -> None:
    covered, widths = 0, []
    for trial in range(20):
        generator = np.random.default_rng(trial)
        shared = generator.normal(size=(20, 2))
        a, b = (shared @ generator.normal(size=(2, 12)) + 0.1 for _ in range(2))  # independent: the truth is 0
        figure = (c := Comparison.drawn(a.T, b.T, trial)).figure(c.mean_spearman(), Figure("", "", 0.0))
        covered += figure.low <= 0 <= figure.high
        widths.append(figure.high - figure.low)
    assert covered >= 17
    small = (c := Comparison.drawn(PREDICTED[:5, :5], MEASURED[:5, :5], 0)).figure(c.slope(), Figure("", "", 0.0))
    assert small.high - small.low > np.mean(widths)


def test_an_interval_needs_most_of_the_draws() -> None:
    draws = np.linspace(0, 1, 2001)
    assert interval(draws)[:2] == pytest.approx((0.025, 0.975))
    draws[:1100] = np.nan
    assert np.isnan(interval(draws)).all()


def test_halves_of_seeds_that_agree_have_correlation_1_and_noise_none() -> None:
    generator = np.random.default_rng(1)
    truth, noise = generator.normal(size=(20, 50, 1)), generator.normal(size=(20, 50, 4))
    assert split_half_spearman(truth + 1e-3 * noise) == pytest.approx(1, abs=1e-3)
    assert abs(split_half_spearman(noise)) < 0.1
    reliable = split_half_spearman(truth + noise)
    assert 0.5 < reliable < 0.75, "two seeds of two others: 1 / (1 + 1/2) = 0.67, a little less of ranks"


def test_points_spread_over_the_range_and_are_distinct_where_many_are_equal() -> None:
    totals = np.concatenate([np.zeros(90), [5.0, -5.0, 4.9, 10.0]])
    points = spread_points(totals, 7)
    assert {90, 91, 93} <= set(points.tolist())
    assert len(set(points.tolist())) == 7
    assert spread_points(totals, 94).tolist() == list(range(94)) == spread_points(totals, 1000).tolist()
