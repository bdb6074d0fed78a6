"""Predicted next to measured effects of single training points: rank correlation, slope and relative error.

Intervals are percentiles of a bootstrap that draws test points and training points independently of each other.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from distinfluence.evaluate.figure import Figure

N_DRAWS = 2_000  # Bootstrap draws: the ends of a 95 % interval rest on 50 draws each.
FEWEST = 5  # Test points, and training points, below which a bootstrap over them says nothing.
MOST_SPLITS = 20  # Ways to split the seeds in two halves that a ceiling is the mean of.


@dataclass(frozen=True)
class Effects:
    """Effects of single training points on single test points.

    Attributes:
        queries: The test points, [q].
        points: The training points, [m].
        predicted: What the scores predict, [q, m].
        measured: What retraining from each seed shows, [q, m, r].
        figures: What the comparison says.
    """

    queries: NDArray[np.int64]
    points: NDArray[np.int64]
    predicted: NDArray[np.float64]
    measured: NDArray[np.float64]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Comparison:
    """Two matrices [q, m] whose rows and columns are drawn again and again.

    Attributes:
        predicted: Predictions, [q, m].
        measured: Measurements, [q, m].
        row_counts: How often each row is in a draw, [draws, q].
        column_counts: How often each column is in a draw, [draws, m].
    """

    predicted: NDArray[np.float64]
    measured: NDArray[np.float64]
    row_counts: NDArray[np.float64]
    column_counts: NDArray[np.float64]

    @classmethod
    def drawn(cls, predicted: NDArray[np.float64], measured: NDArray[np.float64], seed: int) -> "Comparison":
        """Draw rows and columns with replacement; the first draw is the matrices as they are."""
        generator = np.random.default_rng(seed)
        rows, columns = (np.vstack([np.ones(n), counts_of_draws(generator, n)]) for n in predicted.shape)
        return cls(predicted, measured, rows, columns)

    def figure(self, draws: NDArray[np.float64], described: Figure) -> Figure:
        """Return a figure with value and interval.

        Args:
            draws: The statistic, its value first, then of each draw.
            described: A figure that has everything else.

        Returns:
            The figure; without an interval where there are too few points for one.
        """
        value, low, high, error = float(draws[0]), math.nan, math.nan, math.nan
        remarks = [described.remark] if described.remark else []
        n_rows, n_columns = self.predicted.shape
        if min(n_rows, n_columns) < FEWEST:
            remarks.append(
                f"no interval: it needs at least {FEWEST} test points and {FEWEST} training points, got {n_rows} and "
                f"{n_columns}"
            )
        else:
            low, high, error = interval(draws[1:])
        return replace(described, value=value, low=low, high=high, standard_error=error, remark="; ".join(remarks))

    def mean_spearman(self) -> NDArray[np.float64]:
        """Return the mean over rows of Spearman's rank correlation over columns, [1 + draws]."""
        by_row = np.stack(
            [_spearman(a, b, self.column_counts) for a, b in zip(self.predicted, self.measured, strict=True)], axis=1
        )
        known = np.where(np.isnan(by_row), 0.0, self.row_counts)
        return _ratio((known * np.nan_to_num(by_row)).sum(axis=1), known.sum(axis=1))

    def slope(self) -> NDArray[np.float64]:
        """Return the slope of measurements over predictions, each row with an intercept of its own, [1 + draws]."""
        # the intercept takes up what is common to all points, as one point fewer in the mean of the training loss
        a, b = (values - values.mean(axis=1, keepdims=True) for values in (self.predicted, self.measured))
        size = self.column_counts.sum(axis=1, keepdims=True)
        totals_a, totals_b = self.column_counts @ a.T, self.column_counts @ b.T
        covariance = self.column_counts @ (a * b).T - totals_a * totals_b / size
        variance = self.column_counts @ (a * a).T - totals_a**2 / size
        return _ratio((self.row_counts * covariance).sum(axis=1), (self.row_counts * variance).sum(axis=1))

    def relative_error(self) -> NDArray[np.float64]:
        """Return ‖predicted − measured‖ / ‖measured‖, Frobenius norms, [1 + draws]."""
        error, size = (
            np.einsum("bq,qm,bm->b", self.row_counts, values**2, self.column_counts, optimize=True)
            for values in (self.predicted - self.measured, self.measured)
        )
        return np.sqrt(_ratio(error, size))


def counts_of_draws(generator: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Return how often each of n things is in each of the draws with replacement, [draws, n]."""
    return generator.multinomial(n, np.full(n, 1 / n), size=N_DRAWS).astype(np.float64)


def interval(draws: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return both ends of the 95 % percentile interval, and the standard deviation, of the draws that have a value."""
    known = draws[np.isfinite(draws)]
    if known.size < len(draws) / 2:
        return math.nan, math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high), float(known.std(ddof=1))


def split_half_spearman(measured: NDArray[np.float64]) -> float:
    """Return the rank correlation over columns between half of the seeds and the others, mean over rows and splits.

    Args:
        measured: What each seed shows, [q, m, r].

    Returns:
        The correlation; NaN for one seed, and where the measurements do not depend on the seed.
    """
    if not depends_on_seed(measured):
        return math.nan
    r = measured.shape[2]
    found = []
    for half in itertools.islice(itertools.combinations(range(r), r // 2), MOST_SPLITS):
        others = [seed for seed in range(r) if seed not in half]
        one, other = measured[:, :, list(half)].mean(axis=2), measured[:, :, others].mean(axis=2)
        found += [_spearman(a, b, np.ones((1, len(a))))[0] for a, b in zip(one, other, strict=True)]
    known = [value for value in found if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def depends_on_seed(measured: NDArray[np.float64]) -> bool:
    """Whether there are several seeds, the last axis, and not all of them show the same."""
    return bool(measured.shape[-1] > 1 and (measured != measured[..., :1]).any())


def seed_remark(measured: NDArray[np.float64]) -> str:
    """Return why there is no ceiling by other seeds, or an empty text."""
    if depends_on_seed(measured):
        return ""
    return "no ceiling: training does not depend on the seed" if measured.shape[-1] > 1 else "no ceiling from one seed"


def spread_points(totals: NDArray[np.float64], n_points: int) -> NDArray[np.int64]:
    """Choose points whose scores cover the range of scores evenly, both ends included.

    Args:
        totals: One score for each training point, [n_train].
        n_points: How many to choose; all if there are not more.

    Returns:
        The points, sorted.
    """
    if n_points >= totals.size:
        return np.arange(totals.size)
    left = totals.astype(np.float64)
    chosen = []
    # from both ends to the middle: the ends are rare and must not be taken for a neighbour
    targets = np.linspace(left.min(), left.max(), n_points)
    for target in targets[np.argsort(-np.abs(targets - targets.mean()), kind="stable")]:
        nearest = int(np.nanargmin(np.abs(left - target)))
        chosen.append(nearest)
        left[nearest] = np.nan
    return np.sort(np.array(chosen, dtype=np.int64))


def _spearman(one: NDArray[np.float64], other: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Spearman's rank correlation of two vectors [m] whose entries count as often as `counts` [b, m] says.

    Equal values share the mean of their ranks. NaN where either side is constant.
    """
    a, b = (_ranks(values, counts) for values in (one, other))
    size = counts.sum(axis=1, keepdims=True)
    a, b = (ranks - (counts * ranks).sum(axis=1, keepdims=True) / size for ranks in (a, b))
    scale = np.sqrt((counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1))
    return _ratio((counts * a * b).sum(axis=1), scale)


def _ranks(values: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean rank of each value among values that are repeated as `counts` [b, m] says, [b, m]."""
    order = np.argsort(values, kind="stable")
    begins = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)  # of each run of equal values
    of_group = np.add.reduceat(counts[:, order], begins, axis=1)
    group = np.empty(values.size, dtype=np.int64)
    group[order] = np.repeat(np.arange(begins.size), np.diff(begins, append=values.size))
    ranks: NDArray[np.float64] = (np.cumsum(of_group, axis=1) - (of_group - 1) / 2)[:, group]
    return ranks


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    return ratio
