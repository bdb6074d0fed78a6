"""Derivatives of losses by the weights of points, measured on convex training, are exact influences to 1e-6."""

import numpy as np
import pytest

from distinfluence.errors import IndexRangeError, SettingError
from distinfluence.evaluate import Effects, WeightSteps
from tests.evaluate.retrainers import Array, Bank, Convex, networks, ridge, softmax, with_ones

CHECK = WeightSteps(points=10, queries=None)


@pytest.fixture(scope="module", params=[ridge, softmax])
def convex(request: pytest.FixtureRequest) -> Convex:
    made: Convex = request.param()
    return made


@pytest.fixture(scope="module")
def scores(convex: Convex) -> Array:
    return convex.influences()


@pytest.fixture(scope="module")
def effects(convex: Convex, scores: Array) -> Effects:
    return CHECK.measure("exact", scores, Bank(convex))


def test_exact_influences_are_the_derivatives(effects: Effects) -> None:
    error, ranked, sloped = effects.figures
    assert error.check == "weight steps, relative error"
    assert error.value < 1e-9 and error.high < 1e-9
    assert ranked.value == 1.0
    assert sloped.value == pytest.approx(1.0, abs=1e-9)


def test_a_single_small_step_reaches_1e_6(convex: Convex, scores: Array) -> None:
    plain = WeightSteps(points=10, queries=None, step=1e-3, richardson=False).measure("exact", scores, Bank(convex))
    assert plain.figures[0].value < 1e-6
    assert plain.figures[0].remark == "", "one step says nothing about its own error"


def test_the_error_falls_as_the_error_analysis_says(convex: Convex, scores: Array) -> None:
    bank = Bank(convex)
    plain, extrapolated = (
        [
            WeightSteps(points=10, queries=None, step=step, richardson=each).measure("", scores, bank).figures[0].value
            for step in (0.4, 0.2)
        ]
        for each in (False, True)
    )
    assert plain[0] / plain[1] == pytest.approx(4, rel=0.2), "ε²"
    assert extrapolated[0] / extrapolated[1] == pytest.approx(16, rel=0.4), "ε⁴"
    coarse = WeightSteps(points=10, queries=None, step=0.4).measure("", scores, bank).figures[0]
    apart = float(coarse.remark.rpartition(" ")[2])
    assert coarse.value < apart < 2 * plain[0], "what is told of the steps bounds the error"


def test_the_derivative_of_ridge_regression_is_the_closed_form() -> None:
    problem = ridge()
    effects = CHECK.measure("exact", problem.influences(), Bank(problem))
    x, x_test, n = with_ones(problem.x), with_ones(problem.x_test), len(problem.x)
    theta = problem.fitted(np.ones(n))
    hessian = 2 * x.T @ x / n + problem.decay * np.eye(4)
    pull = 2 * (x @ theta.T - problem.y) * x / n  # of a point's weight on the gradient of the training loss
    moved = -np.linalg.solve(hessian, pull.T)  # dθ / dw
    expected = (2 * (x_test @ theta.T - problem.y_test) * x_test) @ moved
    np.testing.assert_allclose(effects.measured[..., 0], expected[:, effects.points], rtol=1e-7, atol=1e-12)
    helpful = expected[:, effects.points] < 0
    np.testing.assert_array_equal(problem.influences()[:, effects.points] > 0, helpful)


def test_wrong_sign_and_scale_are_told(convex: Convex, scores: Array) -> None:
    bank, check = Bank(convex), WeightSteps(points=range(10), queries=None)
    wrong = check.measure("wrong sign", -scores, bank).figures
    assert [each.value for each in wrong] == pytest.approx([2.0, -1.0, -1.0])
    double = check.measure("twice", 2 * scores, bank).figures
    assert [each.value for each in double] == pytest.approx([1.0, 1.0, 0.5])
    assert bank.n_trained == 4 * 10


def test_all_retrainings_are_listed_and_asked_for_in_one_call(convex: Convex, scores: Array) -> None:
    bank, check = Bank(convex), WeightSteps(points=[4, 2], queries=[0], step=0.25)
    listed = check.retrainings(scores, bank)
    assert bank.asked == []
    found = {(int(np.flatnonzero(each.weights != 1)[0]), float(each.weights[each.weights != 1][0])) for each in listed}
    assert found == {(j, w) for j in (2, 4) for w in (0.75, 0.875, 1.125, 1.25)}
    assert all(each.is_weighted and len(each.indices) == len(convex.x) for each in listed)
    check.measure("exact", scores, bank)
    assert [[each.key for each in call] for call in bank.asked] == [[each.key for each in listed]]
    single = WeightSteps(points=[4, 2], queries=[0], step=0.25, richardson=False)
    assert len(single.retrainings(scores, bank)) == 4


def test_a_trainer_that_ignores_weights_is_seen_in_the_figures(convex: Convex, scores: Array) -> None:
    class Deaf(Bank):
        def losses(self, retrainings: list[object]) -> Array:  # type: ignore[override]
            return np.ones((len(retrainings), self.n_test))

    error, ranked, _ = CHECK.measure("exact", scores, Deaf(convex)).figures
    assert np.isnan(error.value) and np.isnan(ranked.value)
    assert "no rank correlation" in ranked.remark


def test_networks_have_a_derivative_for_each_seed() -> None:
    bank = Bank(networks())
    scores = np.random.default_rng(0).normal(size=(bank.n_test, bank.n_train))
    effects = WeightSteps(points=6, queries=6, seeds=(0, 1), step=0.2).measure("random", scores, bank)
    assert effects.measured.shape == (6, 6, 2)
    assert -1 <= effects.figures[1].ceiling <= 1


@pytest.mark.parametrize("step", [0.0, 1.0, -0.1, 1e-9, float("nan")])
def test_a_step_that_cannot_be_is_named(step: float) -> None:
    with pytest.raises(SettingError, match="`step` must be from 1e-8 to less than 1"):
        WeightSteps(step=step)


def test_points_that_cannot_be_are_named(convex: Convex, scores: Array) -> None:
    with pytest.raises(SettingError, match="`points` must be distinct"):
        WeightSteps(points=[1, 1])
    with pytest.raises(IndexRangeError, match="`points` must be from 0 to"):
        WeightSteps(points=[1, 1000]).measure("exact", scores, Bank(convex))
