"""The linear datamodeling score: do the scores of a subset add up to what training on the subset does?"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import NonFiniteError, SettingError, ShapeError
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.statistics import (
    N_DRAWS,
    Estimate,
    PerQuery,
    Ties,
    check_draws,
    check_queries,
    check_subsets,
    correlation_draws,
    rank_correlations,
    ties_of,
)
from distinfluence.evaluate.tiles import ScoreMatrix, Scores

DIGITS = 12  # Digits of a summed score that count: scores that are all 0.1 have sums that differ in the 15th.
MOST_SPLITS = 50  # Splits of the seeds that a ceiling averages over; five seeds have 10, eight have 35.


@dataclass(frozen=True, eq=False)
class LinearDatamodelingScore:
    """Rank correlations of predicted with measured outcomes, with their interval and ceiling.

    Attributes:
        correlations: Spearman's rank correlation over subsets for each query, with its draws; NaN where either side is
            constant.
        estimate: The mean over queries. Its interval is over subsets and queries; the seeds are not resampled.
        ceiling: What outcomes of other seeds reach in place of predictions, see `linear_datamodeling_score` and
            `seed_matched_score`; NaN with one seed.
        attainable: What predictions equal to the expected outcome would reach, estimated from the ceiling; NaN with one
            seed.
        n_retrainings: Retrained models that the outcomes are of.
        check: "LDS" or "LDS, seed-matched".
    """

    correlations: PerQuery
    estimate: Estimate
    ceiling: float
    attainable: float
    n_retrainings: int
    check: str = "LDS"

    @property
    def by_query(self) -> NDArray[np.float64]:
        """The rank correlations, [n_test]; NaN where either side is constant."""
        return self.correlations.values

    @property
    def mean(self) -> float:
        """Mean over the queries that have a correlation."""
        return self.estimate.value

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, over subsets and queries."""
        return self.estimate.standard_error

    def figure(self, method: str, remark: str = "") -> Figure:
        """Return the score as a figure. Its remark says if the sign is wrong, or if queries do not count.

        Args:
            method: Name of the method or baseline.
            remark: A further remark, such as one of `remarks_on_baselines`.

        Returns:
            The figure.
        """
        counted = self.correlations.n_counted
        constant = self.by_query.size - counted
        remarks = [
            "the scores have the wrong sign" if self.estimate.high < 0 else "",
            "not distinguishable from 0" if self.estimate.low <= 0 <= self.estimate.high else "",
            remark,
            f"{constant} of {self.by_query.size} queries do not count, with constant scores or outcomes"
            if constant
            else "",
        ]
        said = "; ".join(each for each in remarks if each)
        figure = self.estimate.figure(self.check, method, n_queries=counted, remark=said)
        return replace(figure, ceiling=self.ceiling, n_retrainings=self.n_retrainings)


def linear_datamodeling_score(
    influences: Scores, subsets: ArrayLike, outcomes: ArrayLike, *, n_draws: int = N_DRAWS, seed: int = 0
) -> LinearDatamodelingScore:
    """Compute the rank correlation of summed influences with measured outcomes, query by query.

    With outcomes of r seeds, the score is against their mean. The ceiling is the score that the mean outcome of ⌊r/2⌋
    seeds gets against the mean of the other seeds, averaged over all such splits (50 of them if there are more). It
    says how well the truth repeats itself. It is not the highest possible score: both halves are noisier than the mean
    over all seeds, and scores need not be noisy. `attainable` is the score that the expected outcome itself would get.
    It is computed from the ceiling by the Spearman-Brown formula, which takes the noise of all seeds and queries to be
    alike.

    Args:
        influences: Scores, [n_test, n_train]; positive where a training point helps. An array, or a result on disk,
            which is read a strip at a time.
        subsets: The training points of each retraining, [s, n_train] bool; at least 8 subsets.
        outcomes: How *good* each retrained model is at each query, minus its loss, [s, n_test] or [s, r, n_test].
        n_draws: Number of bootstrap draws.
        seed: Seed of the draws; two scores from the same seed can be compared draw by draw.

    Returns:
        The correlations, one for each query, and their mean with a 95 % interval.

    Raises:
        ShapeError: If the three arrays do not fit together.
        NonFiniteError: If `influences` or `outcomes` hold NaN or infinity.
        SettingError: If there are fewer than 8 subsets or fewer than 2 queries, or `subsets` are not booleans.
        IncompleteResultError: If `influences` is a result whose run has not finished.

    References:
        Park et al. (2023), "TRAK", section 3.
    """
    check_draws(n_draws)
    matrix = ScoreMatrix(influences, "influences")
    chosen = _checked_subsets(subsets, matrix)
    measured = _checked_outcomes(outcomes, len(chosen), matrix.n_test)
    pairs = [(_predicted(matrix, chosen), ties_of(_by_query(measured.mean(axis=1))))]
    return _scored(pairs, n_draws, seed, reach=_repeatability(measured, seed), n_retrainings=_size(measured))


def seed_matched_score(
    influences_by_seed: Mapping[int, Scores],
    subsets: ArrayLike,
    outcomes: ArrayLike,
    seeds: Sequence[int],
    *,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> LinearDatamodelingScore:
    """Compare the scores of models that were trained from different seeds, each with outcomes from its own seed.

    The scores of the model that was trained from seed k on all points are compared with the outcomes of models that
    were trained from seed k on subsets. The score is the mean over these seeds. The ceiling is what the outcomes of
    another single seed predict of those of seed k, averaged over all such pairs. A method that sees what is special to
    the model's seed may exceed it.

    Args:
        influences_by_seed: Seed → scores of the model that was trained from it on all points, [n_test, n_train].
        subsets: The training points of each retraining, [s, n_train] bool; at least 8 subsets.
        outcomes: How good each retrained model is at each query, minus its loss, [s, r, n_test].
        seeds: The r seeds of `outcomes`, in their order.
        n_draws: Number of bootstrap draws.
        seed: Seed of the draws.

    Returns:
        The correlations, averaged over the seeds of `influences_by_seed`, and their mean with a 95 % interval.
        `attainable` is NaN: the expected outcome of one seed is the outcome itself.

    Raises:
        ShapeError: If the arrays do not fit together.
        NonFiniteError: If scores or outcomes hold NaN or infinity.
        SettingError: If there are fewer than 8 subsets or fewer than 2 queries, no scores, or scores of a seed that is
            not in `seeds`.
        IncompleteResultError: If scores are a result whose run has not finished.
    """
    check_draws(n_draws)
    places = {each: place for place, each in enumerate(seeds)}
    if len(places) < len(seeds) or not influences_by_seed or not set(influences_by_seed) <= set(places):
        raise SettingError(
            f"`influences_by_seed` must have scores for some of the different seeds {list(seeds)}, got scores for "
            f"{list(influences_by_seed)}. Score models that were trained on all points from these seeds."
        )
    shape, totals = None, dict[int, Ties]()
    for each, influences in influences_by_seed.items():
        matrix = ScoreMatrix(influences, f"influences_by_seed[{each}]")
        if shape not in (None, (matrix.n_test, matrix.n_train)):
            raise ShapeError(
                f"`influences_by_seed` must have scores of one shape, got {list(shape or ())} and "
                f"{[matrix.n_test, matrix.n_train]} for seed {each}. Score the same points with every model."
            )
        shape = matrix.n_test, matrix.n_train
        chosen = _checked_subsets(subsets, matrix)
        totals[each] = _predicted(matrix, chosen)
    measured = _checked_outcomes(outcomes, len(chosen), matrix.n_test)
    if measured.shape[1] != len(seeds):
        raise ShapeError(
            f"`outcomes` must be [s, {len(seeds)}, n_test], one for each of `seeds`, got {measured.shape[1]} seeds."
        )
    own = {each: ties_of(_by_query(measured[:, place])) for each, place in places.items()}
    pairs = [(totals[each], own[each]) for each in totals]
    others = [_mean(rank_correlations(own[other], own[each])) for each in totals for other in own if other != each]
    ceiling = _mean(np.array(others)), math.nan
    found = _scored(pairs, n_draws, seed, reach=ceiling, n_retrainings=_size(measured))
    return replace(found, check="LDS, seed-matched")


def _predicted(matrix: ScoreMatrix, chosen: NDArray[np.bool_]) -> Ties:
    """Rank the summed scores of each query. Sums that differ by their rounding alone are equal."""
    totals = matrix.totals(chosen)
    scale = np.abs(totals).max(axis=1, keepdims=True)
    return ties_of(np.round(totals / np.where(scale > 0, scale, 1.0), DIGITS))


def _scored(
    pairs: list[tuple[Ties, Ties]], n_draws: int, seed: int, reach: tuple[float, float], n_retrainings: int
) -> LinearDatamodelingScore:
    """Return the mean correlations of pairs of predicted and measured outcomes; reach: ceiling and attainable."""
    values = sum(rank_correlations(*pair) for pair in pairs) / len(pairs)
    draws = sum(correlation_draws(*pair, n_draws, seed) for pair in pairs) / np.float32(len(pairs))
    correlations = PerQuery(np.asarray(values), np.asarray(draws), seed)
    return LinearDatamodelingScore(correlations, correlations.mean(), *reach, n_retrainings)


def _repeatability(outcomes: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Return the ceiling of outcomes [s, r, n_test], and what the expected outcome would reach; NaN for one seed."""
    r = outcomes.shape[1]
    if r < 2:
        return math.nan, math.nan
    half = r // 2
    found = []
    for first in _splits(r, seed):
        one = outcomes[:, first].mean(axis=1)
        other = np.delete(outcomes, first, axis=1).mean(axis=1)
        found.append(_mean(rank_correlations(ties_of(_by_query(one)), ties_of(_by_query(other)))))
    ceiling = _mean(np.array(found))
    return ceiling, _attainable(ceiling, half, r - half)


def _splits(r: int, seed: int) -> list[list[int]]:
    """Return the first halves of all splits of r seeds in two, or of `MOST_SPLITS` different ones of them."""
    half = r // 2
    even = r % 2 == 0  # a split and its mirror are one: seed 0 is always in the first half
    n_splits = math.comb(r - 1, half - 1) if even else math.comb(r, half)
    if n_splits <= MOST_SPLITS:
        return [list(each) for each in itertools.combinations(range(r), half) if not even or 0 in each]
    generator = np.random.default_rng((seed, 2))
    drawn = dict[tuple[int, ...], None]()
    while len(drawn) < MOST_SPLITS:
        members = sorted(generator.permutation(r)[:half].tolist())
        rest = sorted(set(range(r)) - set(members))
        drawn[tuple(rest if even and 0 in rest else members)] = None
    return [list(each) for each in drawn]


def _attainable(correlation: float, one: int, other: int) -> float:
    """Return the correlation of the expected outcome with the mean of all seeds, from that of two groups of seeds.

    With a share ρ of a single outcome's variance between subsets and the rest noise, means of a seeds have the share
    ρ_a = aρ / (1 + (a − 1)ρ) (Spearman-Brown). Means of a and of b other seeds correlate by √(ρ_a ρ_b), which is
    solved for ρ; the expected outcome and a mean of a + b seeds correlate by √ρ_{a+b}.
    """
    if not correlation > 0:
        return math.nan
    square = correlation**2
    # (ab − c²(a−1)(b−1)) ρ² − c²(a+b−2) ρ − c² = 0, whose positive root is ρ
    quadratic, linear = one * other - square * (one - 1) * (other - 1), square * (one + other - 2)
    share = (linear + math.sqrt(linear**2 + 4 * quadratic * square)) / (2 * quadratic)
    total = one + other
    return math.sqrt(total * share / (1 + (total - 1) * share))


def _checked_subsets(subsets: ArrayLike, matrix: ScoreMatrix) -> NDArray[np.bool_]:
    chosen = np.asarray(subsets)
    if chosen.ndim != 2 or chosen.shape[1] != matrix.n_train:
        raise ShapeError(
            f"`subsets` must be [s, n_train] with subsets of the {matrix.n_train} training points, got "
            f"{list(chosen.shape)} for `{matrix.name}` {[matrix.n_test, matrix.n_train]}. Pass one row of booleans for "
            "each retraining."
        )
    if chosen.dtype != np.bool_ and not np.isin(chosen, (0, 1)).all():
        raise SettingError(
            f"`subsets` must be booleans, got {chosen.dtype} other than 0 and 1. Pass whether each point is in a "
            "subset, not the indices of its points."
        )
    check_subsets("subsets", len(chosen))
    check_queries(matrix.name, matrix.n_test)
    return chosen.astype(np.bool_)


def _checked_outcomes(outcomes: ArrayLike, n_subsets: int, n_test: int) -> NDArray[np.float64]:
    """Return outcomes as [s, r, n_test]."""
    measured = np.asarray(outcomes, dtype=np.float64)
    if (
        measured.ndim not in (2, 3)
        or 0 in measured.shape
        or measured.shape[:: measured.ndim - 1] != (n_subsets, n_test)
    ):
        raise ShapeError(
            f"`outcomes` must be [{n_subsets}, {n_test}], subsets × test points, or [{n_subsets}, r, {n_test}] with r "
            f"seeds, got {list(measured.shape)}."
        )
    if not np.isfinite(measured).all():
        raise NonFiniteError("`outcomes` must be finite, got NaN or infinity. Look at the runs they come from.")
    return measured if measured.ndim == 3 else measured[:, np.newaxis]


def _by_query(outcomes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.ascontiguousarray(outcomes.T)


def _size(outcomes: NDArray[np.float64]) -> int:
    return int(outcomes.shape[0] * outcomes.shape[1])


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan
