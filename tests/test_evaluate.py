"""Mislabel detection counts what stands among the most suspicious points."""

import numpy as np
import pytest

from distinfluence.errors import ShapeError
from distinfluence.evaluate import mislabel_recall, net_harm


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
