"""Leave-one-out: does the loss rise by I/N where a single training point is left out?

Scores are compared with retraining by Spearman's rank correlation over training points, for each query, and by the
slope of the measured rises over the predicted ones. For a network, one retraining differs from another by its path as
much as by the point that is missing: take several seeds, and read the ceiling.

Cost: m points from r seeds are (m + 1)·r retrainings. They serve every method that is asked about the same points.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from distinfluence.evaluate.checks.effects import Comparison, Effects, seed_remark, split_half_spearman, spread_points
from distinfluence.evaluate.checks.score_tiles import (
    Chosen,
    RetrainedLosses,
    check_chosen,
    check_seeds,
    chosen_indices,
    distinct_retrainings,
    read_scores,
)
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.retraining import Retrainer, Retraining
from distinfluence.evaluate.tiles import Scores


@dataclass(frozen=True)
class LeaveOneOut:
    """A check of scores by leaving out single training points.

    Attributes:
        points: How many training points to leave out, which ones, or None for all. A number of points is chosen so that
            their scores, summed over the queries, cover the range of the sums. To compare methods, let one choose
            (`chosen_points`) and give the points to all.
        queries: How many test points to draw (all if there are not more), which test points, or None for all.
        seeds: Seeds to train from, each time.
        draw_seed: Seed of the draw of queries and of the bootstrap.

    Raises:
        SettingError: If a setting is outside of what is possible.
    """

    points: Chosen = 50
    queries: Chosen = 20
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    draw_seed: int = 0

    def __post_init__(self) -> None:
        check_chosen("points", self.points)
        check_chosen("queries", self.queries)
        check_seeds(self.seeds)

    def chosen_points(self, influences: Scores, retrainer: Retrainer) -> NDArray[np.int64]:
        """Return the training points that are left out.

        Args:
            influences: Scores, [n_test, n_train]. Rows of the queries are read if `points` is a number.
            retrainer: The retrainer whose data the scores are about.

        Returns:
            The points, sorted.

        Raises:
            IndexRangeError: If there is no such point or query.
            ShapeError: If the scores are not about the data of the retrainer.
            NonFiniteError: If a score is not finite.
        """
        return chosen_points(self.points, influences, retrainer, self._queries(retrainer))

    def retrainings(self, influences: Scores, retrainer: Retrainer) -> list[Retraining]:
        """List all retrainings that `measure` asks for. Nothing is trained.

        Args:
            influences: Scores, [n_test, n_train].
            retrainer: The retrainer whose data the scores are about.

        Returns:
            The retrainings, each once.

        Raises:
            IndexRangeError: If there is no such point or query.
            ShapeError: If the scores are not about the data of the retrainer.
            NonFiniteError: If a score is not finite.
        """
        return self._retrainings(self.chosen_points(influences, retrainer), retrainer.n_train)

    def measure(self, method: str, influences: Scores, retrainer: Retrainer) -> Effects:
        """Measure how much losses rise without each point, and compare with the scores.

        Args:
            method: Name of the method that the scores are of.
            influences: Scores, [n_test, n_train]; positive where a training point helps.
            retrainer: The retrainer whose data the scores are about. It is asked once, for all losses.

        Returns:
            Predicted rises I/N next to measured ones, with the figures of rank correlation and slope.

        Raises:
            IndexRangeError: If there is no such point or query.
            ShapeError: If the scores are not about the data of the retrainer.
            NonFiniteError: If a score or a loss is not finite.
        """
        queries, n_train = self._queries(retrainer), retrainer.n_train
        points = self.chosen_points(influences, retrainer)
        predicted = read_scores(influences, retrainer, queries, points) / n_train
        runs = self._retrainings(points, n_train)
        losses = RetrainedLosses.made(retrainer, runs, queries)
        full = losses.of(np.ones(n_train), self.seeds)
        measured = np.stack([losses.of(weighted(n_train, j, 0.0), self.seeds) - full for j in points], axis=1)
        comparison = Comparison.drawn(predicted, measured.mean(axis=2), self.draw_seed)
        described = Figure("leave-one-out", method, 0.0, n_queries=len(queries), n_retrainings=len(runs))
        return Effects(queries, points, predicted, measured, rank_and_slope(comparison, described, measured))

    def figures(
        self, scores: Mapping[str, Scores], baselines: Collection[str], retrainer: Retrainer
    ) -> tuple[Figure, ...]:
        """Measure all methods, on the same points.

        Args:
            scores: Method or baseline → scores, [n_test, n_train].
            baselines: The names in `scores` that are baselines.
            retrainer: What trains.

        Returns:
            The figures of `measure` for each method.

        Raises:
            IndexRangeError: If there is no such point or query.
            ShapeError: If scores are not about the data of the retrainer.
            NonFiniteError: If scores or losses are not finite.
        """
        return figures_at_same_points(self, scores, retrainer)

    def _queries(self, retrainer: Retrainer) -> NDArray[np.int64]:
        return chosen_indices("queries", self.queries, retrainer.n_test, self.draw_seed)

    def _retrainings(self, points: NDArray[np.int64], n_train: int) -> list[Retraining]:
        return distinct_retrainings([np.ones(n_train), *(weighted(n_train, j, 0.0) for j in points)], self.seeds)


class PointCheck(Protocol):
    """A check at single training points."""

    @property
    def points(self) -> Chosen:
        """How many, which ones, or None for all."""

    def chosen_points(self, influences: Scores, retrainer: Retrainer) -> NDArray[np.int64]:
        """Return the training points."""

    def measure(self, method: str, influences: Scores, retrainer: Retrainer) -> Effects:
        """Measure one method."""


CheckT = TypeVar("CheckT", bound=PointCheck)


def figures_at_same_points(check: CheckT, scores: Mapping[str, Scores], retrainer: Retrainer) -> tuple[Figure, ...]:
    """Return the figures of several methods at the points that the first of them chooses."""
    first = next(iter(scores.values()))
    points = check.chosen_points(first, retrainer).tolist()
    same = replace(check, points=points)  # type: ignore[type-var]
    return tuple(figure for name, own in scores.items() for figure in same.measure(name, own, retrainer).figures)


def chosen_points(
    points: Chosen, influences: Scores, retrainer: Retrainer, queries: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the training points that a choice stands for: some that cover the range of scores, or the named ones.

    Args:
        points: How many, which ones, or None for all.
        influences: Scores, [n_test, n_train].
        retrainer: The retrainer whose data the scores are about.
        queries: The test points whose scores are summed.

    Returns:
        The points, sorted.
    """
    if points is None or np.ndim(points) == 1:
        return chosen_indices("points", points, retrainer.n_train, 0)
    totals = read_scores(influences, retrainer, queries).sum(axis=0)
    return spread_points(totals, int(np.asarray(points)))


def weighted(n_train: int, point: int, weight: float) -> NDArray[np.float64]:
    """Return the weights of all training points, 1 but for one of them.

    Args:
        n_train: Number of training points.
        point: The other one.
        weight: Its weight.

    Returns:
        The weights, [n_train].
    """
    weights = np.ones(n_train)
    weights[point] = weight
    return weights


def rank_and_slope(comparison: Comparison, described: Figure, measured: NDArray[np.float64]) -> tuple[Figure, Figure]:
    """Return the figures of the mean rank correlation over points, and of the slope of measured over predicted effects.

    Args:
        comparison: Predicted and measured effects, mean over seeds.
        described: What both figures say of the check, the method and the counts.
        measured: The measured effects of each seed, [q, m, r].

    Returns:
        Both figures.
    """
    remark = seed_remark(measured)
    correlations = comparison.mean_spearman()
    if np.isnan(correlations[0]):
        remark = "no rank correlation: scores or measurements are constant" + ("; " + remark if remark else "")
    ranked = replace(
        described,
        check=f"{described.check}, rank correlation",
        ceiling=split_half_spearman(measured),
        remark=remark,
    )
    sloped = replace(described, check=f"{described.check}, slope", remark="1 where the scale is right")
    return comparison.figure(correlations, ranked), comparison.figure(comparison.slope(), sloped)
