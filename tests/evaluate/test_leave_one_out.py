"""Leaving points out of convex training: losses rise by I/N, as dense references and exact influences say."""

import numpy as np
import pytest

from distinfluence.errors import IndexRangeError, NonFiniteError, SettingError, ShapeError
from distinfluence.evaluate import Effects, LeaveOneOut, Retraining
from tests.evaluate.retrainers import Array, Bank, Convex, Ridge, networks, ridge, softmax, with_ones

ALL = LeaveOneOut(points=None, queries=None, seeds=(0,))


@pytest.fixture(scope="module", params=[ridge, softmax])
def convex(request: pytest.FixtureRequest) -> Convex:
    made: Convex = request.param()
    return made


@pytest.fixture(scope="module")
def scores(convex: Convex) -> Array:
    return convex.influences()


@pytest.fixture(scope="module")
def effects(convex: Convex, scores: Array) -> Effects:
    return ALL.measure("exact", scores, Bank(convex))


def test_exact_influences_rank_the_points_as_retraining_does(effects: Effects) -> None:
    ranked, sloped = effects.figures
    assert ranked.check == "leave-one-out, rank correlation"
    assert ranked.value >= 0.99 and ranked.low >= 0.98
    assert ranked.low <= ranked.value <= ranked.high <= 1
    assert ranked.standard_error < 0.01
    assert 1 < sloped.value < 1.3, "the curvature falls with the point, so the loss rises a little more"
    assert sloped.low < sloped.value < sloped.high


def test_what_is_compared_is_a_dense_first_order_prediction_with_models_trained_again() -> None:
    problem = ridge()
    effects = ALL.measure("exact", problem.influences(), Bank(problem))
    x, x_test, n = with_ones(problem.x), with_ones(problem.x_test), len(problem.x)
    theta = problem.fitted(np.ones(n))
    hessian = 2 * x.T @ x / n + problem.decay * np.eye(4)
    at_test, at_train = (2 * (a @ theta.T - y) * a for a, y in ((x_test, problem.y_test), (x, problem.y)))
    np.testing.assert_allclose(effects.predicted, at_test @ np.linalg.solve(hessian, at_train.T) / n, rtol=1e-9)
    for j in (0, 17):
        kept = np.arange(n) != j
        smaller = Ridge(problem.x[kept], problem.y[kept], problem.x_test, problem.y_test, problem.decay)
        rise = problem.test_losses(smaller.fitted(np.ones(n - 1))) - problem.test_losses(theta)
        np.testing.assert_allclose(effects.measured[:, j, 0], rise, atol=1e-13)


def test_wrong_sign_scale_and_order_are_told(convex: Convex, scores: Array, effects: Effects) -> None:
    bank = Bank(convex)
    wrong = ALL.measure("wrong sign", -scores, bank)
    assert wrong.figures[0].value == pytest.approx(-effects.figures[0].value)
    assert wrong.figures[1].value == pytest.approx(-effects.figures[1].value)
    small = ALL.measure("a tenth", scores / 10, bank)
    assert small.figures[0].value == pytest.approx(effects.figures[0].value)
    assert small.figures[1].value == pytest.approx(10 * effects.figures[1].value)
    shuffled = np.random.default_rng(0).permuted(scores, axis=1)
    unrelated = ALL.measure("permuted", shuffled, bank).figures[0]
    assert abs(unrelated.value) < 4 * unrelated.standard_error
    assert unrelated.low < 0 < unrelated.high
    assert bank.n_trained == len(convex.x) + 1, "the same retrainings serve every method"


def test_an_effect_that_is_the_same_for_every_point_does_not_change_the_slope(convex: Convex, scores: Array) -> None:
    shifted = scores + np.arange(len(scores))[:, np.newaxis]
    bank = Bank(convex)
    slopes = [ALL.measure("exact", each, bank).figures[1].value for each in (scores, shifted)]
    assert slopes[1] == pytest.approx(slopes[0])


def test_points_that_are_chosen_cover_the_range_of_scores(convex: Convex, scores: Array) -> None:
    bank, check = Bank(convex), LeaveOneOut(points=12, queries=None, seeds=(0, 1))
    points = check.chosen_points(scores, bank)
    totals = scores.sum(axis=0)
    assert len(set(points.tolist())) == 12
    assert {int(totals.argmin()), int(totals.argmax())} <= set(points.tolist())
    targets = np.linspace(totals.min(), totals.max(), 12)
    covered = np.abs(totals[points][:, None] - targets).min(axis=0)
    possible = np.abs(totals[:, None] - targets).min(axis=0)
    assert (covered <= possible + np.ptp(totals) / 12).all()
    listed = check.retrainings(scores, bank)
    assert len(listed) == 2 * 13 and bank.asked == []
    effects = check.measure("exact", scores, bank)
    assert [[each.key for each in call] for call in bank.asked] == [[each.key for each in listed]]
    assert effects.points.tolist() == points.tolist()
    assert effects.figures[0].n_retrainings == 26 and effects.figures[0].n_queries == len(scores)
    given = LeaveOneOut(points=points.tolist(), queries=None, seeds=(0, 1)).measure("exact", scores, bank)
    assert given.figures == effects.figures
    assert bank.n_trained == 26


def test_there_is_no_ceiling_from_one_seed_or_from_seeds_that_make_no_difference(
    convex: Convex, scores: Array, effects: Effects
) -> None:
    assert np.isnan(effects.figures[0].ceiling) and effects.figures[0].remark == "no ceiling from one seed"
    several = LeaveOneOut(points=6, queries=None, seeds=(0, 1)).measure("exact", scores, Bank(convex)).figures[0]
    assert np.isnan(several.ceiling) and several.remark == "no ceiling: training does not depend on the seed"


def test_the_ceiling_of_networks_is_what_half_of_the_seeds_say_of_the_others() -> None:
    bank = Bank(networks())
    scores = np.random.default_rng(0).normal(size=(bank.n_test, bank.n_train))
    effects = LeaveOneOut(points=range(12), queries=6, seeds=(0, 1)).measure("random", scores, bank)
    one, other = (effects.measured[..., i].argsort(axis=1).argsort(axis=1) for i in (0, 1))
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)])
    assert effects.figures[0].ceiling == pytest.approx(expected)
    assert effects.figures[0].remark == ""


def test_few_points_or_queries_have_no_interval(convex: Convex, scores: Array) -> None:
    few = LeaveOneOut(points=[3, 1, 2], queries=[0], seeds=(0,)).measure("exact", scores, Bank(convex))
    for figure in few.figures:
        assert np.isnan(figure.low) and np.isnan(figure.standard_error) and np.isfinite(figure.value)
        assert "at least 5 test points and 5 training points, got 1 and 3" in figure.remark


def test_constant_scores_have_no_rank_correlation(convex: Convex, scores: Array) -> None:
    constant = LeaveOneOut(points=range(6), seeds=(0,)).measure("constant", np.ones_like(scores), Bank(convex))
    ranked, sloped = constant.figures
    assert np.isnan(ranked.value) and np.isnan(ranked.low) and np.isnan(sloped.value)
    assert ranked.remark.startswith("no rank correlation: scores or measurements are constant")


@pytest.mark.parametrize(
    ("points", "error", "words"),
    [
        ([1, 2, 1], SettingError, "`points` must be distinct, got 1 more than once"),
        (0, SettingError, "`points` must be at least 1"),
        ([], SettingError, "`points` must be a number of points or a list of indices"),
        ([0, 60], IndexRangeError, "`points` must be from 0 to 59, got 60"),
        ([-1], IndexRangeError, "`points` must be from 0 to 59, got -1"),
    ],
)
def test_points_that_cannot_be_are_named(points: object, error: type[Exception], words: str) -> None:
    bank = Bank(softmax())
    with pytest.raises(error, match=words):
        LeaveOneOut(points=points).retrainings(np.zeros((12, 60)), bank)


def test_scores_that_do_not_fit_are_named() -> None:
    bank = Bank(softmax())
    with pytest.raises(ShapeError, match=r"must be \[12, 60\].* got \[12, 59\]"):
        LeaveOneOut(points=[0]).measure("other data", np.zeros((12, 59)), bank)
    with pytest.raises(NonFiniteError, match="for test point"):
        LeaveOneOut(points=[0]).measure("broken", np.full((12, 60), np.inf), bank)
    assert bank.asked == [], "nothing was trained for bad scores"
    assert all(isinstance(each, Retraining) for each in LeaveOneOut(points=[0]).retrainings(np.zeros((12, 60)), bank))
