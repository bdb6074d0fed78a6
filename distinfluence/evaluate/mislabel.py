"""How well scores find mislabelled training points."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import ShapeError


@dataclass(frozen=True)
class MislabelRecall:
    """Of `n_mislabelled` points, `found` are among the `inspected` most suspicious ones; `expected`: by chance."""

    found: int
    inspected: int
    n_mislabelled: int
    expected: float


def net_harm(influences: ArrayLike) -> NDArray[np.float64]:
    """Minus the sum of a training point's influence over all test points: [n_test, n_train] → [n_train].

    Large where removing the point would lower the test loss.
    """
    harm: NDArray[np.float64] = -np.asarray(influences, dtype=np.float64).sum(axis=0)
    return harm


def mislabel_recall(scores: ArrayLike, mislabelled: Sequence[int] | ArrayLike, inspected: int) -> MislabelRecall:
    """How many mislabelled points stand among the `inspected` highest scores; ties by index.

    scores: [n_train], higher is more suspicious. mislabelled: indices of the mislabelled points.

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
