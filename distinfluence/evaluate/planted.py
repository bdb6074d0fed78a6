"""Recall of planted examples: does a query find the training points that were made for it?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import SettingError
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.statistics import N_DRAWS, PerQuery, ties_of
from distinfluence.evaluate.tiles import ScoreMatrix, Scores, checked_points, row_panels


@dataclass(frozen=True, eq=False)
class PlantedRecall:
    """How many planted training points are among the most helpful ones, query by query.

    Attributes:
        queries: The test points with planted training points, [q], ascending.
        recall: Share of a query's planted points among its top points, as many as are planted for it.
        recall_at: k → share among the top k points.
        reciprocal_rank: 1 / rank of the first planted point; equal scores share the mean of their ranks.
        chance: Expected `recall` of a random order.
        n_train: Number of training points.
    """

    queries: NDArray[np.int64]
    recall: PerQuery
    recall_at: Mapping[int, PerQuery]
    reciprocal_rank: PerQuery
    chance: float
    n_train: int

    def figures(self, method: str, remark: str = "") -> list[Figure]:
        """Return all numbers as figures. The remark says what chance gives.

        Args:
            method: Name of the method or baseline.
            remark: A further remark on the recall, such as one of `remarks_on_baselines`.

        Returns:
            "planted recall", "planted recall at k" for each k, and "planted reciprocal rank".
        """
        own = self._figure("planted recall", method, self.recall, self.chance)
        found = [replace(own, remark=f"{own.remark}; {remark}") if remark else own]
        for k, recall in self.recall_at.items():
            found.append(self._figure(f"planted recall at {k}", method, recall, min(k / self.n_train, 1.0)))
        mean = self.reciprocal_rank.mean()
        return [*found, mean.figure("planted reciprocal rank", method, n_queries=self.queries.size)]

    def _figure(self, check: str, method: str, recall: PerQuery, chance: float) -> Figure:
        mean = recall.mean()
        better = mean.low > chance * (1 + 1e-9)  # a recall that is chance exactly is rounded, too
        remark = f"chance {chance:.3f}" if better else f"not better than chance, {chance:.3f}"
        return mean.figure(check, method, n_queries=self.queries.size, remark=remark)


def planted_recall(
    influences: Scores,
    planted: Mapping[int, Sequence[int]] | Sequence[int],
    *,
    ks: Sequence[int] = (),
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> PlantedRecall:
    """Count the planted training points among the most helpful ones of each query.

    Equal scores count as if they were in random order, so that a method that scores most points 0 finds none by luck.

    Args:
        influences: Scores, [n_test, n_train]; positive where a training point helps. An array, or a result on disk,
            which is read a block of rows at a time.
        planted: Query → indices of its planted training points; or indices of points that are planted for all queries.
        ks: Further numbers of top points to look at.
        n_draws: Number of bootstrap draws over queries.
        seed: Seed of the draws.

    Returns:
        The recall of each query, the reciprocal rank, and what chance gives.

    Raises:
        ShapeError: If `influences` is not [n_test, n_train].
        NonFiniteError: If `influences` hold NaN or infinity.
        IndexRangeError: If `planted` names test or training points that do not exist.
        SettingError: If there are fewer than 2 queries, a query has no planted points, or k is below 1.
        IncompleteResultError: If `influences` is a result whose run has not finished.

    >>> scores = [[0.1, 0.9, 0.2, 0.8], [0.5, 0.1, 0.2, 0.3]]
    >>> planted_recall(scores, {0: [1, 2], 1: [0]}).recall.values
    array([0.5, 1. ])
    """
    matrix = ScoreMatrix(influences, "influences")
    by_query = planted if isinstance(planted, Mapping) else dict.fromkeys(range(matrix.n_test), planted)
    points = {query: checked_points(f"planted[{query}]", by_query[query], matrix.n_train) for query in by_query}
    queries = checked_points("planted", list(points), matrix.n_test)
    if empty := [query for query, own in points.items() if not own.size]:
        raise SettingError(f"`planted` must have training points for each query, got none for {empty[:5]}.")
    if bad := [k for k in ks if k < 1]:
        raise SettingError(f"`ks` must be at least 1, got {bad}.")
    n_columns = 2 + len(ks)  # the recall at as many as are planted, at each k, and the reciprocal rank
    found = np.empty((queries.size, n_columns))
    for rows, (scores,) in row_panels([matrix]):
        inside = (queries >= rows.start) & (queries < rows.stop)
        for place in np.flatnonzero(inside).tolist():
            own = points[int(queries[place])]
            found[place] = _of_query(scores[queries[place] - rows.start], own, [own.size, *ks])
    recall, *at, reciprocal = (PerQuery.of(each, n_draws=n_draws, seed=seed) for each in found.T)
    chance = float(np.mean([own.size for own in points.values()])) / matrix.n_train
    return PlantedRecall(queries, recall, dict(zip(ks, at, strict=True)), reciprocal, chance, matrix.n_train)


def _of_query(scores: NDArray[np.float64], planted: NDArray[np.int64], ks: Sequence[int]) -> list[float]:
    ties = ties_of(scores[np.newaxis])
    above, equal = scores.size - ties.upto[0, planted], ties.upto[0, planted] - ties.below[0, planted]
    recalls = [float(ties.in_top(k)[0, planted].mean()) for k in ks]
    return [*recalls, float(1 / (above + (equal + 1) / 2).min())]
