"""The linear datamodeling score on outcomes that are made up."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from distinfluence.errors import NonFiniteError, ShapeError
from distinfluence.evaluate import linear_datamodeling_score

RANDOM = np.random.default_rng(0)
SCORES = RANDOM.normal(size=(4, 30))
SUBSETS = RANDOM.random((20, 30)) < 0.5


def test_scores_that_add_up_to_the_outcomes_are_worth_one() -> None:
    found = linear_datamodeling_score(SCORES, SUBSETS, 3 + 2 * SUBSETS @ SCORES.T)
    np.testing.assert_allclose(found.by_query, 1)
    assert found.mean == pytest.approx(1) and found.standard_error == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(linear_datamodeling_score(-SCORES, SUBSETS, SUBSETS @ SCORES.T).by_query, -1)


def test_it_is_the_rank_correlation_with_ties() -> None:
    outcomes = np.round(RANDOM.normal(size=(20, 4)), 0)
    found = linear_datamodeling_score(SCORES, SUBSETS, outcomes)
    for query in range(4):
        expected = spearmanr(SUBSETS @ SCORES[query], outcomes[:, query]).statistic
        assert found.by_query[query] == pytest.approx(expected)


def test_a_query_without_variation_does_not_count() -> None:
    outcomes = SUBSETS @ SCORES.T
    outcomes[:, 2] = 1.0
    found = linear_datamodeling_score(SCORES, SUBSETS, outcomes)
    assert np.isnan(found.by_query[2]) and found.mean == pytest.approx(1)


def test_bad_shapes_and_numbers_are_refused() -> None:
    outcomes = SUBSETS @ SCORES.T
    with pytest.raises(ShapeError, match="subsets"):
        linear_datamodeling_score(SCORES, SUBSETS[:, :-1], outcomes)
    with pytest.raises(ShapeError, match="outcomes"):
        linear_datamodeling_score(SCORES, SUBSETS, outcomes.T)
    with pytest.raises(NonFiniteError, match="influences"):
        linear_datamodeling_score(SCORES * np.nan, SUBSETS, outcomes)
