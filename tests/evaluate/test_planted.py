"""Planted training points are counted among the most helpful ones."""

from typing import Any

import numpy as np
import pytest

from distinfluence.errors import IndexRangeError, SettingError
from distinfluence.evaluate import planted_recall, remarks_on_baselines

N_TEST, N_TRAIN = 12, 50
RANDOM = np.random.default_rng(0)
PLANTED = {query: RANDOM.permutation(N_TRAIN)[: 2 + query % 3].tolist() for query in range(0, N_TEST, 2)}
NOISE = RANDOM.normal(size=(N_TEST, N_TRAIN))
SCORES = NOISE.copy()
for _query, _points in PLANTED.items():
    SCORES[_query, _points] += 2.0


def test_recall_and_reciprocal_rank_are_those_of_sorted_rows() -> None:
    found = planted_recall(SCORES, PLANTED, ks=[1, 10], n_draws=100)
    assert found.queries.tolist() == list(PLANTED)
    for place, (query, points) in enumerate(PLANTED.items()):
        order = np.argsort(-SCORES[query]).tolist()
        ranks = sorted(order.index(point) + 1 for point in points)
        for k, recall in ((len(points), found.recall), (1, found.recall_at[1]), (10, found.recall_at[10])):
            assert recall.values[place] == pytest.approx(sum(rank <= k for rank in ranks) / len(points))
        assert found.reciprocal_rank.values[place] == pytest.approx(1 / ranks[0])
    assert found.chance == pytest.approx(np.mean([len(points) for points in PLANTED.values()]) / N_TRAIN)
    names = [figure.check for figure in found.figures("cg", "does not beat loss")]
    assert names == ["planted recall", "planted recall at 1", "planted recall at 10", "planted reciprocal rank"]
    figure = found.figures("cg", "does not beat loss")[0]
    assert figure.remark == "chance 0.060; does not beat loss" and figure.n_queries == 6
    assert figure.low < figure.value < figure.high


def test_equal_scores_find_no_more_than_chance() -> None:
    found = planted_recall(np.zeros((3, 50)), [0, 1], ks=[5], n_draws=20)
    assert found.recall.values == pytest.approx([0.04] * 3) and found.recall_at[5].values == pytest.approx([0.1] * 3)
    assert found.reciprocal_rank.values == pytest.approx([1 / 25.5] * 3)
    assert [figure.remark for figure in found.figures("zero")] == [
        "not better than chance, 0.040",
        "not better than chance, 0.100",
        "",
    ]


def test_ties_at_the_border_count_in_part() -> None:
    scores = [[3.0, 2.0, 2.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]]
    found = planted_recall(scores, {0: [0, 1], 1: [0, 1]}, ks=[3], n_draws=2)
    assert found.recall.values == pytest.approx([(1 + 1 / 3) / 2, 0]) and found.recall_at[3].values[0] == pytest.approx(
        5 / 6
    )


def test_points_that_are_planted_for_all_queries_are_one_list() -> None:
    everywhere = planted_recall(SCORES, [3, 4, 4], n_draws=20)
    each = planted_recall(SCORES, {query: [3, 4] for query in range(N_TEST)}, n_draws=20)
    assert np.array_equal(everywhere.recall.values, each.recall.values) and everywhere.chance == 0.04


def test_recalls_are_compared_with_those_of_baselines() -> None:
    recalls = {"cg": planted_recall(SCORES, PLANTED).recall, "random": planted_recall(NOISE, PLANTED).recall}
    assert remarks_on_baselines(recalls, ["random"]) == {"cg": "", "random": "baseline"}


@pytest.mark.parametrize(
    ("planted", "ks", "error", "message"),
    [
        ({0: [1]}, (), SettingError, "at least 2 queries for an interval, got 1"),
        ({0: [1], 1: []}, (), SettingError, r"training points for each query, got none for \[1\]"),
        ({0: [1], 12: [1]}, (), IndexRangeError, "`planted` must be whole numbers from 0 to 11"),
        ({0: [1], 1: [50]}, (), IndexRangeError, r"`planted\[1\]` must be whole numbers from 0 to 49"),
        ([1], (0,), SettingError, r"`ks` must be at least 1, got \[0\]"),
    ],
)
def test_bad_input_is_named(planted: Any, ks: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        planted_recall(SCORES, planted, ks=ks)
