"""Linear datamodeling scores of several methods against one set of retrained models."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distinfluence.evaluate.checks.score_tiles import check_seeds
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.lds import linear_datamodeling_score, seed_matched_score
from distinfluence.evaluate.retraining import Retrainer, random_subsets, retrainings_of
from distinfluence.evaluate.statistics import check_subsets, remarks_on_baselines
from distinfluence.evaluate.tiles import Scores


@dataclass(frozen=True)
class LinearDatamodeling:
    """A check of scores by training on random subsets: do the scores of a subset add up to what training on it does?

    Attributes:
        n_subsets: Number of random subsets.
        fraction: Part of the training set that a subset holds.
        seeds: Seeds that each subset is trained from.
        matched: Method → seed → scores of the model that was trained from that seed on all points, for the seed-matched
            score. Empty for none.
        draw_seed: Seed of the subsets and of the bootstrap.

    Raises:
        SettingError: If a setting is outside of what is possible.
    """

    n_subsets: int = 100
    fraction: float = 0.5
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    matched: Mapping[str, Mapping[int, Scores]] | None = None
    draw_seed: int = 0

    def __post_init__(self) -> None:
        check_subsets("n_subsets", self.n_subsets)
        check_seeds(self.seeds)

    def subsets(self, n_train: int) -> NDArray[np.bool_]:
        """Draw the subsets.

        Args:
            n_train: Number of training points.

        Returns:
            Which points each subset holds, [s, n_train] bool.

        Raises:
            SettingError: If a subset would hold no point or all of them.
        """
        return random_subsets(n_train, self.n_subsets, fraction=self.fraction, seed=self.draw_seed)

    def figures(
        self, scores: Mapping[str, Scores], baselines: Collection[str], retrainer: Retrainer
    ) -> tuple[Figure, ...]:
        """Measure all methods.

        Args:
            scores: Method or baseline → scores, [n_test, n_train].
            baselines: The names in `scores` that are baselines.
            retrainer: What trains.

        Returns:
            "LDS" of each, and "LDS, seed-matched" of those that `matched` has scores of.

        Raises:
            ShapeError: If scores are not about the data of the retrainer.
            NonFiniteError: If scores or losses are not finite.
            SettingError: If there are fewer than 2 queries.
        """
        subsets = self.subsets(retrainer.n_train)
        losses = retrainer.losses(retrainings_of(subsets, list(self.seeds)))
        outcomes = -losses.reshape(len(subsets), len(self.seeds), retrainer.n_test)
        found = {
            name: linear_datamodeling_score(own, subsets, outcomes, seed=self.draw_seed) for name, own in scores.items()
        }
        matched = {
            name: seed_matched_score(own, subsets, outcomes, self.seeds, seed=self.draw_seed)
            for name, own in (self.matched or {}).items()
        }
        remarks = remarks_on_baselines({name: one.correlations for name, one in found.items()}, baselines)
        of_seed = [name for name in baselines if name in matched]
        remarks_matched = remarks_on_baselines({name: one.correlations for name, one in matched.items()}, of_seed)
        return (
            *(one.figure(name, remarks[name]) for name, one in found.items()),
            *(one.figure(name, remarks_matched[name]) for name, one in matched.items()),
        )
