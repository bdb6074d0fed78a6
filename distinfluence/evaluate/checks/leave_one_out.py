"""Leave-one-out: does the loss rise by I/N where a single training point is left out?

Scores are compared with retraining by Spearman's rank correlation over training points, for each query, and by the
slope of the measured rises over the predicted ones. For a network, one retraining differs from another by its path as
much as by the point that is missing: take several seeds, and read the ceiling.

Cost: m points from r seeds are (m + 1)·r retrainings. They serve every method that is asked about the same points.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from distinfluence.evaluate.checks.effects import Comparison, Effects, seed_remark, split_half_spearman
from distinfluence.evaluate.checks.point_check import PointCheck
from distinfluence.evaluate.checks.score_tiles import (
    Chosen,
    RetrainedLosses,
    distinct_retrainings,
    read_scores,
)
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.retraining import Retrainer, Retraining
from distinfluence.evaluate.tiles import Scores


@dataclass(frozen=True)
class LeaveOneOut(PointCheck):
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

    @override
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

    @override
    def _retrainings(self, points: NDArray[np.int64], n_train: int) -> list[Retraining]:
        return distinct_retrainings([np.ones(n_train), *(weighted(n_train, j, 0.0) for j in points)], self.seeds)


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
