"""Removing what scores say helps makes losses rise, compared with random removals from the same seeds."""

from dataclasses import replace

import numpy as np
import pytest

from distinfluence.errors import IndexRangeError, NonFiniteError, SettingError, ShapeError
from distinfluence.evaluate import LossRises, QueryLossDifference, Retraining
from tests.evaluate.retrainers import Array, Bank, Networks, networks

CHECK = QueryLossDifference(fractions=(0.05, 0.1), seeds=(0, 1, 2), queries=10, n_controls=4)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank(networks())


@pytest.fixture(scope="module")
def scores(bank: Bank) -> Array:
    assert isinstance(bank.of, Networks)
    return bank.of.influences()


@pytest.fixture(scope="module")
def random_scores(scores: Array) -> Array:
    return np.random.default_rng(5).normal(size=scores.shape)


@pytest.fixture(scope="module")
def measured(bank: Bank, scores: Array) -> tuple[LossRises, ...]:
    return CHECK.measure("GGN", scores, bank)


def test_losses_rise_more_than_after_random_removals(measured: tuple[LossRises, ...]) -> None:
    for each in measured:
        assert each.figure.low > 0.05
        assert each.figure.low < each.figure.value < each.figure.high
        assert each.figure.value > 5 * each.figure.standard_error / 2
    assert measured[1].figure.value > measured[0].figure.value, "more is removed"


def test_the_figure_is_what_the_losses_of_the_retrained_models_say(
    bank: Bank, scores: Array, measured: tuple[LossRises, ...]
) -> None:
    each, k, full = measured[1], 10, np.ones(bank.n_train)
    rises = np.empty((10, 3))
    for row, query in enumerate(each.queries):
        weights = full.copy()
        weights[np.argsort(-scores[query])[:k]] = 0
        for column, seed in enumerate(CHECK.seeds):
            after, before = (bank.kept[Retraining(w, seed).key][query] for w in (weights, full))
            rises[row, column] = after - before
    np.testing.assert_allclose(each.rises, rises)
    assert each.random_rises.shape == (4, 10, 3)
    assert each.figure.value == pytest.approx(rises.mean() - each.random_rises.mean())
    assert each.figure.remark.startswith(f"loss rises by {rises.mean():.3g}, after random removals by ")


def test_all_retrainings_are_listed_before_and_asked_for_in_one_call(bank: Bank, scores: Array) -> None:
    own = Bank(bank.of, dict(bank.kept))
    listed = CHECK.retrainings(scores, own)
    assert own.asked == [], "a list trains nothing"
    measured = CHECK.measure("GGN", scores, own)
    assert [[each.key for each in call] for call in own.asked] == [[each.key for each in listed]]
    assert len({each.key for each in listed}) == len(listed) <= 3 * (1 + 2 * (10 + 4))
    assert {len(each.indices) for each in listed} == {96, 91, 86}
    assert measured[0].figure.n_retrainings + measured[1].figure.n_retrainings == len(listed) + 3


def test_random_removals_serve_every_method(bank: Bank, scores: Array, random_scores: Array) -> None:
    ours, theirs = ({each.key for each in CHECK.retrainings(s, bank)} for s in (scores, random_scores))
    assert len(ours & theirs) >= 3 * (1 + 2 * 4)
    other_queries = replace(CHECK, queries=[0, 1])
    assert len({each.key for each in other_queries.retrainings(scores, bank)} & theirs) >= 3 * (1 + 2 * 4)


def test_scores_that_know_nothing_and_scores_of_the_wrong_sign_are_told(
    bank: Bank, scores: Array, random_scores: Array
) -> None:
    for each in CHECK.measure("random", random_scores, bank):
        assert each.figure.low < 0 < each.figure.high
    for each in CHECK.measure("wrong sign", -scores, bank):
        assert each.figure.high < 0


def test_other_seeds_that_choose_among_the_removals_are_the_ceiling(
    bank: Bank, measured: tuple[LossRises, ...], random_scores: Array
) -> None:
    for each in measured:
        assert each.figure.ceiling == pytest.approx(each.figure.value, rel=0.3), "the scores choose about as well"
        assert "two halves of the seeds have rank correlation" in each.figure.remark
    for each in CHECK.measure("random", random_scores, bank):
        assert each.figure.ceiling > each.figure.high, "some other query's removal does more harm"
    for each in replace(CHECK, seeds=(0,)).measure("random", random_scores, bank):
        assert np.isnan(each.figure.ceiling)
        assert "no ceiling: one seed" in each.figure.remark
        assert each.figure.low < each.figure.high, "queries and random removals are drawn again"


def test_one_removal_for_all_queries_takes_the_summed_scores(bank: Bank, scores: Array) -> None:
    check = replace(CHECK, together=True, fractions=(0.1,), queries=None)
    (measured,) = check.measure("GGN", scores, bank)
    assert measured.figure.check == "QLD 10 %, queries together"
    assert measured.figure.value > 0
    assert "more than after 4 of 4 random removals" in measured.figure.remark
    removed = np.argsort(-scores.sum(axis=0))[:10]
    listed = [each for each in check.retrainings(scores, bank) if not each.weights[removed].any()]
    assert [(each.seed, each.indices.size) for each in listed] == [(0, 86), (1, 86), (2, 86)]
    assert len(check.retrainings(scores, bank)) == 3 * (1 + 1 + 4)


def test_equal_scores_are_removed_in_random_order_and_remarked(bank: Bank) -> None:
    nothing = np.zeros((bank.n_test, bank.n_train))
    removed = {tuple(np.flatnonzero(each.weights == 0)) for each in CHECK.retrainings(nothing, bank)}
    assert tuple(range(5)) not in removed, "data are often sorted by class"
    assert len(removed) == 1 + 2 * (1 + 4), "one removal serves all queries"
    few = nothing.copy()
    few[:, 7] = 1.0
    assert all(each.weights[7] == 0 for each in replace(CHECK, n_controls=1).retrainings(few, bank)[3:6])
    remark = CHECK.measure("nothing", nothing, bank)[0].figure.remark
    assert "equal scores at the cut, where a random order decides: 10 of 10 queries" in remark
    assert "fewer positive scores than the 5 points that are removed: 10 of 10 queries" in remark


def test_few_queries_have_no_interval(bank: Bank, scores: Array) -> None:
    (measured,) = replace(CHECK, queries=[3, 1], fractions=(0.05,)).measure("GGN", scores, bank)
    assert measured.queries.tolist() == [1, 3]
    assert np.isnan(measured.figure.low) and np.isfinite(measured.figure.value)
    assert "no interval: it needs at least 5 queries, got 2" in measured.figure.remark


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fractions": (0.05, 1.0)}, "`fractions` must lie between 0 and 1"),
        ({"fractions": ()}, "`fractions` must lie between 0 and 1"),
        ({"fractions": (0.1, 0.1)}, "`fractions` must be distinct"),
        ({"n_controls": 0}, "`n_controls` must be at least 1"),
        ({"seeds": ()}, "`seeds` must be at least one seed"),
        ({"seeds": (1, 1)}, "`seeds` must be at least one seed, each of them once"),
        ({"queries": 0}, "`queries` must be at least 1"),
        ({"queries": [4, 2, 4]}, "`queries` must be distinct, got 4"),
        ({"queries": [0.5]}, "`queries` must be a number of points or a list of indices"),
        ({"queries": [[1], [1, 2]]}, "`queries` must be a number of points or a list of indices"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        replace(CHECK, **settings)


@pytest.mark.parametrize("fraction", [0.01, 0.999])
def test_a_fraction_of_less_than_a_point_or_of_all_is_named(bank: Bank, scores: Array, fraction: float) -> None:
    with pytest.raises(SettingError, match=f"got {fraction:g} of 96 training points. Take at least 0.01"):
        replace(CHECK, fractions=(0.5, fraction)).retrainings(scores, bank)


def test_a_fraction_of_one_point_is_one_point(bank: Bank, scores: Array) -> None:
    sizes = {each.indices.size for each in replace(CHECK, fractions=(1 / 96,)).retrainings(scores, bank)}
    assert sizes == {96, 95}


def test_scores_and_queries_of_other_data_are_named(bank: Bank, scores: Array) -> None:
    with pytest.raises(ShapeError, match=r"`influences` must be \[24, 96\].* got \[96, 24\]"):
        CHECK.retrainings(scores.T, bank)
    with pytest.raises(IndexRangeError, match="`queries` must be from 0 to 23, got 24"):
        replace(CHECK, queries=[0, 24]).retrainings(scores, bank)
    with pytest.raises(IndexRangeError, match="`queries` must be from 0 to 23, got -1"):
        replace(CHECK, queries=[0, -1]).retrainings(scores, bank)


def test_values_that_are_not_finite_are_named_where_they_matter(bank: Bank, scores: Array) -> None:
    broken = scores.copy()
    broken[5, 17] = np.nan
    with pytest.raises(NonFiniteError, match="for test point 5"):
        replace(CHECK, queries=[3, 5]).retrainings(broken, bank)
    replace(CHECK, queries=[3, 4]).retrainings(broken, bank)

    class Diverged(Bank):
        def losses(self, retrainings: list[Retraining]) -> Array:
            losses = np.zeros((len(retrainings), self.n_test))
            losses[4] = np.inf
            return losses

    with pytest.raises(NonFiniteError, match="1 of 87 retrained models, the first of them from seed 1 on 91 of 96"):
        CHECK.measure("GGN", scores, Diverged(bank.of))


def test_a_retrainer_that_forgets_a_model_is_named(bank: Bank, scores: Array) -> None:
    class Forgetful(Bank):
        def losses(self, retrainings: list[Retraining]) -> Array:
            return np.zeros((len(retrainings) - 1, self.n_test))

    with pytest.raises(ShapeError, match=r"`losses` of the retrainer must be \[87, 24\]"):
        CHECK.measure("GGN", scores, Forgetful(bank.of))
