"""How well scores find mislabelled training points."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import ShapeError


@dataclass(frozen=True)
class MislabelRecall:
    """How many mislabelled points are among the most suspicious ones.

    Attributes:
        found: Mislabelled points among the inspected ones.
        inspected: Points that were inspected, the most suspicious ones.
        n_mislabelled: Mislabelled points in all.
        expected: Number that would be found by chance.
    """

    found: int
    inspected: int
    n_mislabelled: int
    expected: float


def net_harm(influences: ArrayLike) -> NDArray[np.float64]:
    """Sum the influence of each training point over all test points, and change the sign.

    Args:
        influences: Scores, [n_test, n_train].

    Returns:
        The net harm of each training point, [n_train]: large where removing the point would lower the test loss.
    """
    harm: NDArray[np.float64] = -np.asarray(influences, dtype=np.float64).sum(axis=0)
    return harm


def mislabel_recall(scores: ArrayLike, mislabelled: Sequence[int] | ArrayLike, inspected: int) -> MislabelRecall:
    """Count the mislabelled points among the `inspected` highest scores.

    Args:
        scores: One score for each training point, [n_train]; higher is more suspicious. Ties go by index.
        mislabelled: Indices of the mislabelled points.
        inspected: Number of points to inspect.

    Returns:
        The count, with what chance would give.

    Raises:
        ShapeError: If `scores` is not [n_train], or `inspected` is not from 1 to n_train.

    >>> mislabel_recall([0.1, 0.9, 0.2, 0.8], mislabelled=[1, 2], inspected=2)
    MislabelRecall(found=1, inspected=2, n_mislabelled=2, expected=1.0)
    """
    scores = np.asarray(scores, dtype=np.float64)
    wrong = np.asarray(mislabelled, dtype=np.int64)
    if scores.ndim != 1 or not 0 < inspected <= scores.size:
        raise ShapeError(
            f"`scores` must be [n_train] with n_train ≥ `inspected`={inspected} > 0, got {scores.shape}. "
            "Pass one score per training point."
        )
    suspicious = np.argsort(-scores, kind="stable")[:inspected]
    found = int(np.isin(suspicious, wrong).sum())
    return MislabelRecall(found, inspected, wrong.size, inspected * wrong.size / scores.size)
