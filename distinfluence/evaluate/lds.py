"""The linear datamodeling score: do the scores of a subset add up to what training on the subset does?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import NonFiniteError, ShapeError


@dataclass(frozen=True)
class LinearDatamodelingScore:
    """Rank correlations of predicted with measured outcomes.

    Attributes:
        by_query: Spearman's rank correlation over subsets, [n_test] float64; NaN where either side is constant.
    """

    by_query: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean over the queries that have a correlation."""
        return float(np.nanmean(self.by_query))

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, over queries; NaN for fewer than two."""
        known = self.by_query[~np.isnan(self.by_query)]
        return float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")


def linear_datamodeling_score(
    influences: ArrayLike, subsets: ArrayLike, outcomes: ArrayLike
) -> LinearDatamodelingScore:
    """Compute the rank correlation of summed influences with measured outcomes, query by query.

    Args:
        influences: Scores, [n_test, n_train]; positive where a training point helps.
        subsets: The training points of each retraining, [s, n_train] bool.
        outcomes: How *good* each retrained model is at each query, [s, n_test]: minus its loss, averaged over seeds.

    Returns:
        The correlations, one for each query.

    Raises:
        ShapeError: If the three arrays do not fit together, or there are fewer than two subsets.
        NonFiniteError: If `influences` or `outcomes` hold NaN or infinity.

    References:
        Park et al. (2023), "TRAK", section 3.
    """
    scores, chosen, measured = (np.asarray(a, dtype=np.float64) for a in (influences, subsets, outcomes))
    if scores.ndim != 2 or chosen.ndim != 2 or chosen.shape[1] != scores.shape[1] or len(chosen) < 2:
        raise ShapeError(
            f"`subsets` must be [s, n_train] with at least 2 subsets of the {scores.shape[-1]} training points, got "
            f"{list(chosen.shape)} for influences {list(scores.shape)}. Pass one row of booleans for each retraining."
        )
    if measured.shape != (len(chosen), len(scores)):
        raise ShapeError(
            f"`outcomes` must be [{len(chosen)}, {len(scores)}], subsets × test points, got {list(measured.shape)}."
        )
    for name, values in (("influences", scores), ("outcomes", measured)):
        if not np.isfinite(values).all():
            raise NonFiniteError(f"`{name}` must be finite, got NaN or infinity. Look at the runs they come from.")
    predicted = scores @ chosen.T  # [n_test, s]
    pairs = zip(predicted, measured.T, strict=True)
    return LinearDatamodelingScore(np.array([_spearman(one, other) for one, other in pairs]))


def _spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    a, b = _ranks(one), _ranks(other)
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts + 1) / 2)[inverse]
    return ranks
