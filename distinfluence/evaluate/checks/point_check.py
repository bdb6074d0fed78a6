"""What checks at single training points have in common: which points, and the same ones for all methods."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from distinfluence.evaluate.checks.effects import Effects, spread_points
from distinfluence.evaluate.checks.score_tiles import Chosen, check_chosen, check_seeds, chosen_indices, read_scores
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.retraining import Retrainer, Retraining
from distinfluence.evaluate.tiles import Scores


@dataclass(frozen=True)
class PointCheck(ABC):
    """A check at single training points; see its subclasses for the fields."""

    points: Chosen
    queries: Chosen
    seeds: Sequence[int]
    draw_seed: int = 0

    def __post_init__(self) -> None:
        check_chosen("points", self.points)
        check_chosen("queries", self.queries)
        check_seeds(self.seeds)

    def chosen_points(self, influences: Scores, retrainer: Retrainer) -> NDArray[np.int64]:
        """Return the training points that are looked at.

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

    @abstractmethod
    def measure(self, method: str, influences: Scores, retrainer: Retrainer) -> Effects:
        """Measure one method.

        Args:
            method: Name of the method that the scores are of.
            influences: Scores, [n_test, n_train]; positive where a training point helps.
            retrainer: The retrainer whose data the scores are about. It is asked once, for all losses.

        Returns:
            Predicted effects next to measured ones, with their figures.
        """

    @abstractmethod
    def _retrainings(self, points: NDArray[np.int64], n_train: int) -> list[Retraining]:
        """List the retrainings at these points."""

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
        points = self.chosen_points(next(iter(scores.values())), retrainer).tolist()  # the first method chooses
        same = replace(self, points=points)
        return tuple(figure for name, own in scores.items() for figure in same.measure(name, own, retrainer).figures)

    def _queries(self, retrainer: Retrainer) -> NDArray[np.int64]:
        return chosen_indices("queries", self.queries, retrainer.n_test, self.draw_seed)


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
