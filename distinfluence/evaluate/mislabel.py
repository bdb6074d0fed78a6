"""How well scores find mislabelled training points."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import NonFiniteError, SettingError, ShapeError
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.statistics import N_DRAWS, Estimate, check_draws, not_beaten, resampled_counts
from distinfluence.evaluate.tiles import ScoreMatrix, Scores, checked_points

PLAIN_LOSS = "plain loss"  # Name of the baseline that every detection is compared with.
MIN_POINTS = 2  # Mislabelled points, and others, without which a bootstrap has no spread.


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


def net_harm(influences: Scores) -> NDArray[np.float64]:
    """Sum the influence of each training point over all test points, and change the sign.

    Args:
        influences: Scores, [n_test, n_train]; an array, or a result on disk, which is read a strip at a time.

    Returns:
        The net harm of each training point, [n_train]: large where removing the point would lower the test loss.
    """
    matrix = ScoreMatrix(influences, "influences")
    sums = [values.sum(axis=0, dtype=np.float64) for _, values in matrix.by_columns()]
    return -np.concatenate(sums)


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


@dataclass(frozen=True, eq=False)
class MislabelDetection:
    """How well suspicion scores tell mislabelled points from the others.

    Attributes:
        method: Name of the method; "plain loss" for the baseline.
        auc: Probability that a mislabelled point is more suspicious than another point; ties count half.
        recall: Share of the mislabelled points among the `inspected` most suspicious ones, ties broken at random.
        gains: The paired differences of `auc` and `recall` to the plain loss; None for the plain loss itself.
        inspected: Points that are inspected.
        chance: Recall of inspecting points at random.
    """

    method: str
    auc: Estimate
    recall: Estimate
    gains: tuple[Estimate, Estimate] | None
    inspected: int
    chance: float

    def figures(self) -> list[Figure]:
        """Return both numbers as figures. The remark says if the method does not beat the plain loss.

        Returns:
            "mislabel AUC" and "mislabel recall".
        """
        of_auc, of_recall = ("baseline", "baseline") if self.gains is None else map(_remark, self.gains)
        context = f"{self.inspected} points inspected, chance {self.chance:.3f}"
        return [
            self.auc.figure("mislabel AUC", self.method, remark=of_auc),
            self.recall.figure(
                "mislabel recall", self.method, remark=f"{of_recall}; {context}" if of_recall else context
            ),
        ]


def detect_mislabelled(
    suspicions: Mapping[str, ArrayLike],
    mislabelled: Sequence[int] | ArrayLike,
    losses: ArrayLike,
    *,
    inspect: float | None = None,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> list[MislabelDetection]:
    """Measure how well scores find mislabelled points, next to the plain loss.

    Mislabelled and other points are resampled separately, since their numbers are known and not a sample.

    Args:
        suspicions: Method → one score for each training point, [n_train]; higher is more suspicious, such as `net_harm`
            or self-influences.
        mislabelled: Indices of the mislabelled points, or a mask [n_train].
        losses: The loss of each training point under the model, [n_train].
        inspect: Fraction of the points that is inspected, 0 < inspect ≤ 1. Default: as many points as are mislabelled.
        n_draws: Number of bootstrap draws.
        seed: Seed of the draws.

    Returns:
        The plain loss first, then each method with its paired difference to the plain loss.

    Raises:
        ShapeError: If scores are not [n_train].
        NonFiniteError: If scores or losses hold NaN or infinity.
        IndexRangeError: If an index in `mislabelled` is not one of a training point.
        SettingError: If fewer than 2 points, or all but fewer than 2, are mislabelled; if `inspect` is out of range; or
            if a method is called "plain loss".

    >>> loss, harm = [0.3, 0.1, 0.2, 0.9, 0.1], [0.1, 0.8, 0.2, 0.9, 0.0]
    >>> [f"{found.method}: {found.auc.value:.2f}" for found in detect_mislabelled({"harm": harm}, [1, 3], loss)]
    ['plain loss: 0.58', 'harm: 1.00']
    """
    check_draws(n_draws)
    if PLAIN_LOSS in suspicions:
        raise SettingError(
            f"`suspicions` must not be called {PLAIN_LOSS!r}, which is the baseline. Choose another name."
        )
    loss = _checked_scores("losses", losses, None)
    wrong = _checked_mask(mislabelled, loss.size)
    inspected = _n_inspected(inspect, wrong)
    levels = {PLAIN_LOSS: _Levels.of(loss, wrong)}
    for name, scores in suspicions.items():
        levels[name] = _Levels.of(_checked_scores(f"suspicions[{name!r}]", scores, loss.size), wrong)
    estimates = _bootstrapped(levels, inspected, n_draws, seed)
    auc_of_loss, recall_of_loss = estimates[PLAIN_LOSS]
    found = []
    for name, (auc, recall) in estimates.items():
        gains = None if name == PLAIN_LOSS else (auc.minus(auc_of_loss), recall.minus(recall_of_loss))
        found.append(MislabelDetection(name, auc, recall, gains, inspected, inspected / loss.size))
    return found


@dataclass(frozen=True, eq=False)
class _Levels:
    """The different scores of a method, ascending, n of them, and the level of each point."""

    n: int
    of_wrong: NDArray[np.int64]
    of_others: NDArray[np.int64]

    @classmethod
    def of(cls, scores: NDArray[np.float64], wrong: NDArray[np.bool_]) -> "_Levels":
        different, level = np.unique(scores, return_inverse=True)
        return cls(different.size, level[wrong], level[~wrong])

    def auc_and_recall(self, wrong: NDArray[np.float64], others: NDArray[np.float64], inspected: int) -> list[float]:
        """Return both numbers of a draw, in which each point is present as often as the counts say."""
        bad = np.bincount(self.of_wrong, wrong, self.n)
        good = np.bincount(self.of_others, others, self.n)
        both = bad + good
        above = both.sum() - np.cumsum(both)
        share = np.divide(inspected - above, both, out=np.zeros(self.n), where=both > 0).clip(0, 1)
        pairs = bad @ (np.cumsum(good) - good / 2)
        return [float(pairs / (wrong.sum() * others.sum())), float(bad @ share / wrong.sum())]


def _bootstrapped(
    levels: Mapping[str, _Levels], inspected: int, n_draws: int, seed: int
) -> dict[str, tuple[Estimate, Estimate]]:
    """Return AUC and recall of each method, all from the same draws of points."""
    sizes = [points.size for points in (levels[PLAIN_LOSS].of_wrong, levels[PLAIN_LOSS].of_others)]
    blocks = (resampled_counts(n, n_draws, (seed, group)) for group, n in enumerate(sizes))
    drawn = ((row for _, counts in each for row in counts) for each in blocks)
    draws = {name: np.empty((n_draws, 2)) for name in levels}
    for i, (wrong, others) in enumerate(zip(*drawn, strict=True)):  # all draws at once would be n_draws × n_train
        for name, each in levels.items():
            draws[name][i] = each.auc_and_recall(wrong, others, inspected)
    once = [np.ones(n) for n in sizes]
    values = {name: each.auc_and_recall(once[0], once[1], inspected) for name, each in levels.items()}
    return {
        name: (Estimate(auc, draws[name][:, 0]), Estimate(recall, draws[name][:, 1]))
        for name, (auc, recall) in values.items()
    }


def _remark(gain: Estimate) -> str:
    return not_beaten({f"the {PLAIN_LOSS}": gain})


def _n_inspected(inspect: float | None, wrong: NDArray[np.bool_]) -> int:
    if inspect is None:
        return int(wrong.sum())
    if not 0 < inspect <= 1:
        raise SettingError(f"`inspect` must be a fraction of the points, 0 < inspect ≤ 1, got {inspect}.")
    return max(1, round(inspect * wrong.size))


def _checked_scores(name: str, scores: ArrayLike, n: int | None) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or (n is not None and values.size != n):
        expected = "" if n is None else f" with the {n} training points of `losses`"
        raise ShapeError(
            f"`{name}` must be [n_train]{expected}, got {list(values.shape)}. Pass one score per training point."
        )
    if not np.isfinite(values).all():
        raise NonFiniteError(f"`{name}` must be finite, got NaN or infinity. Look at the run it comes from.")
    return values


def _checked_mask(mislabelled: Sequence[int] | ArrayLike, n: int) -> NDArray[np.bool_]:
    given = np.asarray(mislabelled)
    if given.dtype == np.bool_:
        if given.shape != (n,):
            raise ShapeError(f"`mislabelled` must be [{n}] as a mask, got {list(given.shape)}.")
        wrong = given
    else:
        index = checked_points("mislabelled", given, n)
        wrong = np.zeros(n, dtype=bool)
        wrong[index] = True
    n_wrong = int(wrong.sum())
    if not MIN_POINTS <= n_wrong <= n - MIN_POINTS:
        raise SettingError(
            f"`mislabelled` must leave at least {MIN_POINTS} points mislabelled and {MIN_POINTS} not, for an interval, "
            f"got {n_wrong} of {n} points. Mislabel more points."
        )
    return wrong
