"""Mislabel detection counts what stands among the most suspicious points."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from distinfluence.errors import IndexRangeError, NonFiniteError, SettingError, ShapeError
from distinfluence.evaluate import detect_mislabelled, mislabel_recall, net_harm
from distinfluence.evaluate.statistics import resampled_counts


def test_net_harm_is_minus_the_sum_over_test_points() -> None:
    np.testing.assert_allclose(net_harm([[1.0, -2.0], [3.0, -4.0]]), [-4.0, 6.0])


def test_recall_counts_the_mislabelled_points_among_the_highest_scores() -> None:
    scores = np.array([0.0, 5.0, 1.0, 4.0, 3.0])
    recall = mislabel_recall(scores, [1, 2, 3], inspected=2)
    assert (recall.found, recall.inspected, recall.n_mislabelled) == (2, 2, 3)
    assert recall.expected == pytest.approx(2 * 3 / 5)


def test_ties_go_to_the_lower_index() -> None:
    assert mislabel_recall([1.0, 1.0, 1.0], [0], inspected=1).found == 1
    assert mislabel_recall([1.0, 1.0, 1.0], [2], inspected=1).found == 0


@pytest.mark.parametrize(("scores", "inspected"), [([[1.0]], 1), ([1.0], 2), ([1.0], 0)])
def test_scores_of_the_wrong_shape_say_so(scores: list[float], inspected: int) -> None:
    with pytest.raises(ShapeError, match="one score per training point"):
        mislabel_recall(scores, [0], inspected)


N = 60
WRONG = np.arange(0, N, 5)
RANDOM = np.random.default_rng(0)
IS_WRONG = np.isin(np.arange(N), WRONG)
LOSS = np.round(RANDOM.normal(size=N) + 1.0 * IS_WRONG, 1)  # with ties
BETTER = np.round(RANDOM.normal(size=N) + 3.0 * IS_WRONG, 1)


def recall_of(scores: NDArray[np.float64], wrong: NDArray[np.bool_], inspected: int) -> float:
    """The mean over 400 random orders of equal scores."""
    random = np.random.default_rng(0)
    orders = (np.lexsort((random.random(scores.size), -scores))[:inspected] for _ in range(400))
    return float(np.mean([wrong[order].sum() / wrong.sum() for order in orders]))


def test_auc_and_recall_are_those_of_resampled_points() -> None:
    loss, better = detect_mislabelled({"better": BETTER}, WRONG, LOSS, n_draws=8, seed=3)
    assert (loss.method, better.method, better.inspected, better.chance) == ("plain loss", "better", 12, 0.2)
    for found, scores in ((loss, LOSS), (better, BETTER)):
        assert found.auc.value == pytest.approx(roc_auc_score(IS_WRONG, scores))
        assert found.recall.value == pytest.approx(recall_of(scores, IS_WRONG, 12), abs=0.01)
        of_wrong, of_others = (
            np.concatenate([counts for _, counts in resampled_counts(n, 8, (3, group))]).astype(int)
            for group, n in enumerate((12, 48))
        )
        for draw in range(8):
            chosen = (
                np.repeat(np.flatnonzero(IS_WRONG), of_wrong[draw]),
                np.repeat(np.flatnonzero(~IS_WRONG), of_others[draw]),
            )
            points = np.concatenate(chosen)
            assert found.auc.draws[draw] == pytest.approx(roc_auc_score(IS_WRONG[points], scores[points]))
            expected = recall_of(scores[points], IS_WRONG[points], 12)
            assert found.recall.draws[draw] == pytest.approx(expected, abs=0.02)


def test_a_method_that_does_not_beat_the_plain_loss_is_said_so() -> None:
    suspicions = {"better": BETTER, "same": LOSS, "worse": -LOSS}
    loss, better, same, worse = detect_mislabelled(suspicions, WRONG, LOSS, n_draws=200)
    assert loss.gains is None and better.gains is not None and better.gains[0].low > 0
    auc, recall = better.figures()
    assert (auc.check, auc.remark, recall.check) == ("mislabel AUC", "", "mislabel recall")
    assert recall.remark == "12 points inspected, chance 0.200" and recall.low < recall.value < recall.high
    assert loss.figures()[0].remark == "baseline"
    assert same.figures()[0].remark == "does not beat the plain loss (difference 0.000 [0.000, 0.000])"
    assert worse.figures()[0].remark.startswith("does not beat the plain loss (difference -0")
    assert worse.figures()[1].remark.endswith("; 12 points inspected, chance 0.200")


def test_a_mask_and_a_fraction_are_taken() -> None:
    by_mask = detect_mislabelled({}, IS_WRONG, LOSS, inspect=0.5, n_draws=20)[0]
    by_index = detect_mislabelled({}, WRONG, LOSS, inspect=0.5, n_draws=20)[0]
    assert by_mask.inspected == 30 and by_mask.recall.value == by_index.recall.value
    assert np.array_equal(by_mask.recall.draws, by_index.recall.draws)
    assert detect_mislabelled({}, WRONG, LOSS, inspect=1.0, n_draws=20)[0].recall.low == 1


def test_the_standard_error_of_the_auc_is_that_of_de_long() -> None:
    random, n = np.random.default_rng(1), 1000
    wrong = np.arange(n) < 200
    loss = random.normal(size=n) + 1.5 * wrong
    (found,) = detect_mislabelled({}, wrong, loss, n_draws=400)
    above = loss[wrong][:, None] > loss[~wrong]  # every pair of a mislabelled point and another
    expected = np.sqrt(above.mean(axis=1).var(ddof=1) / 200 + above.mean(axis=0).var(ddof=1) / 800)
    assert found.auc.standard_error == pytest.approx(expected, rel=0.1)
    assert found.auc.high - found.auc.low == pytest.approx(2 * 1.96 * expected, rel=0.15)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"suspicions": {"cg": LOSS[:-1]}}, ShapeError, r"`suspicions\['cg'\]` must be \[n_train\] with the 60"),
        ({"suspicions": {"cg": np.where(LOSS > 1, np.nan, LOSS)}}, NonFiniteError, r"`suspicions\['cg'\]`"),
        ({"suspicions": {"plain loss": LOSS}}, SettingError, "must not be called 'plain loss'"),
        ({"losses": np.full(N, np.inf)}, NonFiniteError, "`losses` must be finite"),
        ({"mislabelled": [3]}, SettingError, "at least 2 points mislabelled and 2 not, for an interval, got 1 of 60"),
        ({"mislabelled": range(59)}, SettingError, "got 59 of 60"),
        ({"mislabelled": [3, 60]}, IndexRangeError, "from 0 to 59"),
        ({"mislabelled": IS_WRONG[:-1]}, ShapeError, r"`mislabelled` must be \[60\] as a mask"),
        ({"inspect": 0.0}, SettingError, "`inspect` must be a fraction"),
        ({"inspect": 12}, SettingError, "`inspect` must be a fraction"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"suspicions": {}, "mislabelled": WRONG, "losses": LOSS}
    with pytest.raises(error, match=message):
        detect_mislabelled(**(given | change))
