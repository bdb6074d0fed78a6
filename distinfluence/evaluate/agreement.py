"""Agreement between methods: do they rank the training points of a query alike?"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distinfluence.errors import SettingError, ShapeError
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.statistics import N_DRAWS, PerQuery, check_queries, rank_correlations, ties_of
from distinfluence.evaluate.tiles import ScoreMatrix, Scores, row_panels


@dataclass(frozen=True, eq=False)
class Agreement:
    """How much alike two methods rank the training points, query by query.

    Attributes:
        first: Name of one method.
        second: Name of the other.
        correlation: Spearman's rank correlation over all training points; NaN where a method's scores are all equal.
        overlap: Share of the top k that both have in common; ties are broken at random.
        k: Number of top points that `overlap` is of.
        n_train: Number of training points.
    """

    first: str
    second: str
    correlation: PerQuery
    overlap: PerQuery
    k: int
    n_train: int

    def figures(self) -> list[Figure]:
        """Return both numbers as figures, by the name "first, second".

        Returns:
            "rank agreement" and "overlap of the top k".
        """
        names, n_test = f"{self.first}, {self.second}", self.correlation.values.size
        counted = self.correlation.n_counted
        constant = f"{n_test - counted} of {n_test} queries do not count, with constant scores"
        remark = "" if counted == n_test else constant
        return [
            self.correlation.mean().figure("rank agreement", names, n_queries=counted, remark=remark),
            self.overlap.mean().figure(
                f"overlap of the top {self.k}", names, n_queries=n_test, remark=f"chance {self.k / self.n_train:.3f}"
            ),
        ]


def rank_agreement(
    influences: Mapping[str, Scores], *, k: int = 10, n_draws: int = N_DRAWS, seed: int = 0
) -> list[Agreement]:
    """Compare the rankings of each two methods.

    Args:
        influences: Method → scores, [n_test, n_train]. Arrays, or results on disk, which are read a block of rows at a
            time.
        k: Number of most helpful training points to compare, at most n_train.
        n_draws: Number of bootstrap draws over queries.
        seed: Seed of the draws.

    Returns:
        One agreement for each pair of methods, in their order.

    Raises:
        ShapeError: If scores are not [n_test, n_train], or not of one shape.
        NonFiniteError: If scores hold NaN or infinity.
        SettingError: If there are fewer than two methods or two queries, or `k` is not from 1 to n_train.
        IncompleteResultError: If scores are a result whose run has not finished.
    """
    if len(influences) < 2:
        raise SettingError(f"`influences` must have at least 2 methods to compare, got {list(influences)}.")
    matrices = {name: ScoreMatrix(scores, f"influences[{name!r}]") for name, scores in influences.items()}
    shapes = {name: (matrix.n_test, matrix.n_train) for name, matrix in matrices.items()}
    if len(set(shapes.values())) > 1:
        raise ShapeError(f"`influences` must have scores of one shape, got {shapes}. Score the same points.")
    n_test, n_train = next(iter(shapes.values()))
    check_queries("influences", n_test)
    if not 1 <= k <= n_train:
        raise SettingError(f"`k` must be from 1 to n_train={n_train}, got {k}.")
    pairs = list(itertools.combinations(matrices, 2))
    found = np.empty((len(pairs), 2, n_test))
    for rows, scores in row_panels(list(matrices.values())):
        ties = {name: ties_of(values) for name, values in zip(matrices, scores, strict=True)}
        top = {name: each.in_top(k) for name, each in ties.items()}
        for i, (first, second) in enumerate(pairs):
            found[i, 0, rows] = rank_correlations(ties[first], ties[second])
            found[i, 1, rows] = np.einsum("ij,ij->i", top[first], top[second]) / k
    correlations, overlaps = ([PerQuery.of(each, n_draws=n_draws, seed=seed) for each in found[:, i]] for i in range(2))
    parts = zip(pairs, correlations, overlaps, strict=True)
    return [Agreement(*pair, correlation, overlap, k, n_train) for pair, correlation, overlap in parts]
