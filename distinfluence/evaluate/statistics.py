"""Bootstrap intervals: how far a figure would move with other queries, and with other subsets.

Queries and subsets are resampled independently of each other (Owen's pigeonhole bootstrap), because both are samples: a
mean rank correlation over 200 queries has one draw of subsets in common. A subset that is drawn twice counts twice in
the ranks. Every method is resampled in the same way from the same seed, so that differences between methods are paired.

On simulated correlations with noise that all queries share, the 95 % intervals cover the truth in 94 to 96 % of the
cases for 8 to 100 subsets; a bootstrap over queries alone covers it in 55 to 70 %. Few subsets make the mean too small:
by 0.05 for 8 of them, by less than 0.005 for 100.

A thousand draws of 200 queries × 100 subsets take about a second on one core.

References:
    Owen (2007), "The pigeonhole bootstrap", Annals of Applied Statistics 1(2).
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import SettingError, ShapeError
from distinfluence.evaluate.figure import Figure

N_DRAWS = 1000
TAIL = 2.5  # Per cent of the draws that lie outside each end of the 95 % interval.
MIN_QUERIES = 2
# Eight subsets have 6435 different resamples, more than there are draws. Six have 462, and of five, one draw in ten has
# two subsets or fewer, whose rank correlation is -1, 1 or unknown.
MIN_SUBSETS = 8
BLOCK = 2**17  # Numbers in an array of the inner loop: one megabyte stays in the cache of a core.

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its bootstrap draws.

    Attributes:
        value: The number, of the data as they are.
        draws: The same number of resampled data, [n_draws]; NaN where a draw does not determine it.
    """

    value: float
    draws: Array

    @property
    def low(self) -> float:
        """Lower end of the 95 % percentile interval; NaN if there is none."""
        return self._percentile(TAIL)

    @property
    def high(self) -> float:
        """Upper end of the 95 % percentile interval; NaN if there is none."""
        return self._percentile(100 - TAIL)

    @property
    def standard_error(self) -> float:
        """Standard deviation of the draws; NaN if there is no interval."""
        known = self._known()
        return float(known.std(ddof=1)) if known.size > 1 else math.nan

    def minus(self, other: "Estimate") -> "Estimate":
        """Return the paired difference of two estimates.

        Args:
            other: An estimate from the same seed and the same number of draws.

        Returns:
            The difference, draw by draw.
        """
        return Estimate(self.value - other.value, self.draws - other.draws)

    def figure(self, check: str, method: str, *, n_queries: int = 0, remark: str = "") -> Figure:
        """Return the number with its interval as a figure.

        Args:
            check: What was measured.
            method: Name of the method or baseline.
            n_queries: Test points that the number is about.
            remark: What a reader must know to read it.

        Returns:
            The figure, without a ceiling.
        """
        interval = self.low, self.high, self.standard_error
        return Figure(check, method, self.value, *interval, n_queries=n_queries, remark=remark)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def _percentile(self, percent: float) -> float:
        known = self._known()
        return float(np.percentile(known, percent)) if known.size > 1 else math.nan

    def _known(self) -> Array:
        return self.draws[np.isfinite(self.draws)]


@dataclass(frozen=True, eq=False)
class PerQuery:
    """One number for each query, and what it is for resampled subsets.

    Attributes:
        values: The numbers, [n_test]; NaN where a query does not count.
        draws: The numbers of each draw of subsets, [n_draws, n_test]; rows that are all equal where nothing but the
            queries is resampled.
        seed: Seed of the draws.
    """

    values: Array
    draws: NDArray[np.float32] | Array
    seed: int

    @classmethod
    def of(cls, values: ArrayLike, *, n_draws: int = N_DRAWS, seed: int = 0) -> "PerQuery":
        """Take numbers of queries for a bootstrap over the queries alone.

        Args:
            values: The numbers, [n_test]; NaN where a query does not count.
            n_draws: Number of draws.
            seed: Seed of the draws.

        Returns:
            The numbers, each the same in every draw.

        Raises:
            ShapeError: If `values` is not [n_test].
            SettingError: If there are fewer than 2 queries, or `n_draws` is below 2.
        """
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.ndim != 1:
            raise ShapeError(f"`values` must be [n_test], one number for each query, got {list(numbers.shape)}.")
        check_queries("values", numbers.size)
        check_draws(n_draws)
        return cls(numbers, np.broadcast_to(numbers, (n_draws, numbers.size)), seed)

    @property
    def n_counted(self) -> int:
        """Number of queries that count."""
        return int(np.isfinite(self.values).sum())

    def mean(self) -> Estimate:
        """Return the mean over the queries that count, with a bootstrap over queries (and over subsets, if drawn).

        Returns:
            The mean; NaN if no query counts, without an interval if fewer than two do.
        """
        known = np.isfinite(self.values)
        value = float(self.values[known].mean()) if known.any() else math.nan
        if known.sum() < MIN_QUERIES:
            return Estimate(value, np.full(len(self.draws), np.nan))
        # Queries that do not count are not resampled either: n draws of n queries that do.
        own = self.draws[:, known]
        means = np.empty(len(own))
        for rows, counts in resampled_counts(own.shape[1], len(own), (self.seed, 1)):
            determined = np.isfinite(own[rows])
            weights = counts * determined
            totals, sizes = np.where(determined, own[rows], 0.0) * weights, weights.sum(axis=1)
            means[rows] = np.divide(totals.sum(axis=1), sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)
        return Estimate(value, means)

    def minus(self, other: "PerQuery") -> "PerQuery":
        """Return the paired difference for each query. A query counts if it counts in both.

        Args:
            other: Numbers of the same queries, from the same draws.

        Returns:
            The differences.

        Raises:
            SettingError: If the other numbers are not of as many queries, as many draws and the same seed.
        """
        ours, theirs = ((*each.draws.shape, each.seed) for each in (self, other))
        if ours != theirs:
            raise SettingError(
                f"`other` must have the draws, queries and seed {ours}, got {theirs}. Compute both with the same "
                "`n_draws` and `seed`, for the same queries."
            )
        return PerQuery(self.values - other.values, self.draws - other.draws, self.seed)


def remarks_on_baselines(values: Mapping[str, PerQuery], baselines: Collection[str]) -> dict[str, str]:
    """Say of each method which baselines it does not beat.

    A method beats a baseline if the 95 % interval of the mean paired difference lies above 0.

    Args:
        values: A number for each query, such as `LinearDatamodelingScore.correlations`, by name of the method or
            baseline; larger is better. All are from the same draws.
        baselines: The names in `values` that are baselines.

    Returns:
        Name → remark: empty for a method that beats every baseline, "baseline" for a baseline.

    Raises:
        SettingError: If a baseline is not in `values`, or the draws are not the same.
    """
    if missing := [name for name in baselines if name not in values]:
        raise SettingError(f"`baselines` must be names in `values`, got {missing}. The names are {list(values)}.")
    remarks = dict.fromkeys(values, "baseline")
    for name, ours in values.items():
        if name not in baselines:
            gains = {baseline: ours.minus(values[baseline]).mean() for baseline in values if baseline in baselines}
            remarks[name] = not_beaten(gains)
    return remarks


def not_beaten(gains: Mapping[str, Estimate]) -> str:
    """Return the remark for paired differences to baselines: "does not beat …", or nothing."""
    unbeaten = [f"{name} (difference {gain})" for name, gain in gains.items() if not gain.low > 0]
    return f"does not beat {', '.join(unbeaten)}" if unbeaten else ""


def check_subsets(name: str, n_subsets: int) -> None:
    """Refuse too few subsets for an interval."""
    if n_subsets < MIN_SUBSETS:
        raise SettingError(
            f"`{name}` must hold at least {MIN_SUBSETS} subsets for an interval, got {n_subsets}. "
            "Retrain on more subsets; 50 to 100 give useful intervals."
        )


def check_queries(name: str, n_queries: int) -> None:
    """Refuse too few queries for an interval."""
    if n_queries < MIN_QUERIES:
        raise SettingError(
            f"`{name}` must be about at least {MIN_QUERIES} queries for an interval, got {n_queries}. "
            "Score more test points."
        )


def check_draws(n_draws: int) -> None:
    """Refuse a number of draws that has no spread."""
    if n_draws < 2:
        raise SettingError(f"`n_draws` must be at least 2, got {n_draws}. Leave it out for {N_DRAWS}.")


def resampled_counts(n: int, n_draws: int, seed: tuple[int, ...]) -> Iterator[tuple[slice, Array]]:
    """Draw n of n things with replacement, `n_draws` times, a block of draws at a time.

    Args:
        n: Number of things.
        n_draws: Number of draws.
        seed: Seed of the draws.

    Yields:
        The draws of a block, and how often each thing is in each of them, [draws in the block, n].
    """
    generator = np.random.default_rng(seed)
    most = max(1, BLOCK // n)
    for start in range(0, n_draws, most):
        size = min(most, n_draws - start)
        drawn = generator.integers(0, n, (size, n)) + n * np.arange(size)[:, np.newaxis]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        yield slice(start, start + size), counts.astype(np.float64)


class Ties(NamedTuple):
    """Where each value of a row stands among the others, [n, m] each.

    Attributes:
        order: Indices that sort the row.
        below: How many values of the row are smaller.
        upto: How many values of the row are smaller or equal.
    """

    order: NDArray[np.int64]
    below: NDArray[np.int64]
    upto: NDArray[np.int64]

    def centred_ranks(self) -> Array:
        """Return twice the ranks, less their mean, [n, m]: equal values share the mean of their ranks."""
        ranks: Array = (self.below + self.upto - self.order.shape[1]).astype(np.float64)
        return ranks

    def in_top(self, k: int | NDArray[np.int64]) -> Array:
        """Return the chance of each value to be among the k largest if ties are broken at random, [n, m]."""
        above = self.order.shape[1] - self.upto
        chances: Array = np.clip((k - above) / (self.upto - self.below), 0.0, 1.0)
        return chances


def ties_of(values: NDArray[np.float64] | NDArray[np.float32]) -> Ties:
    """Sort each row of [n, m] values once, and note which are equal."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    m = values.shape[1]
    new = np.ones(values.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    position = np.arange(m)
    starts = np.maximum.accumulate(np.where(new, position, 0), axis=1)
    last = np.ones(values.shape, dtype=bool)
    last[:, :-1] = new[:, 1:]
    ends = np.minimum.accumulate(np.where(last, position + 1, m)[:, ::-1], axis=1)[:, ::-1]
    below, upto = np.empty_like(starts), np.empty_like(starts)
    np.put_along_axis(below, order, starts, axis=1)
    np.put_along_axis(upto, order, ends, axis=1)
    return Ties(order, below, upto)


def rank_correlations(one: Ties, other: Ties) -> Array:
    """Return Spearman's rank correlation of each row of one with the same row of the other, [n]; NaN if constant."""
    a, b = one.centred_ranks(), other.centred_ranks()
    dots = (np.einsum("ij,ij->i", x, y) for x, y in ((a, b), (a, a), (b, b)))
    return _correlations(*dots)


def correlation_draws(one: Ties, other: Ties, n_draws: int, seed: int) -> NDArray[np.float32]:
    """Return the rank correlations of resampled columns.

    A column that is drawn several times counts as that many: its rank is the mean of the ranks that its copies take, as
    if the resampled row had been ranked. With the columns sorted once, such ranks are sums of cumulative counts.

    Args:
        one: Where the values of [n, m] stand in their rows.
        other: The same of other values, [n, m].
        n_draws: Number of draws of m columns.
        seed: Seed of the draws.

    Returns:
        The correlations, [n_draws, n]; NaN where a draw leaves equal values only.
    """
    n, m = one.order.shape
    found = np.empty((n_draws, n), dtype=np.float32)
    for rows, by_draw in resampled_counts(m, n_draws, (seed, 0)):
        counts = np.ascontiguousarray(by_draw.T)  # [m, draws]: sums over columns then go along whole rows of memory
        for i in range(n):
            a, b = _resampled_ranks(one, i, counts), _resampled_ranks(other, i, counts)
            weighted, weighted_b = a * counts, b * counts
            dots = (np.einsum("ij,ij->j", x, y) for x, y in ((weighted, b), (weighted, a), (weighted_b, b)))
            found[rows, i] = _correlations(*dots)
    return found


def _resampled_ranks(ties: Ties, row: int, counts: Array) -> Array:
    """Return twice the ranks of a row's columns in each draw, less their mean, [m, draws]."""
    m, draws = counts.shape
    cumulative = np.zeros((m + 1, draws))
    np.cumsum(counts[ties.order[row]], axis=0, out=cumulative[1:])
    ranks: Array = cumulative[ties.below[row]]
    ranks += cumulative[ties.upto[row]]
    ranks -= m
    return ranks


def _correlations(both: Array, one: Array, other: Array) -> Array:
    size = np.sqrt(one * other)  # sums of whole numbers: exactly 0 for a constant row
    found: Array = np.divide(both, size, out=np.full(len(size), np.nan), where=size > 0)
    return found
