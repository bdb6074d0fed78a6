"""Weight steps: is −I/N the derivative of a test loss by the weight of a training point?

A point is given a little more and a little less weight, the model is trained again, and the central difference
D(ε) = (ℓ(1 + ε) − ℓ(1 − ε)) / 2ε of each query's loss is compared with −I/N: more weight on a helpful point lowers the
loss. Nothing is left out, so there is no error of the straight line: on a convex model that is trained to its minimum,
the exact influence agrees to the accuracy of the difference.

How accurate the difference is:

- Truncation. D(ε) is wrong by ε²/6 times the third derivative: relative to D, by about (εh)², where h < 1 is the
  leverage of the point (h = gᵀH⁻¹g/N, usually 0.01 to 0.3).
- Rounding. A loss that is known to ±δ makes D wrong by δ/ε, that is δN/(ε|I|) relative to D. For N = 1000, |I| near 1,
  δ = 1e-14 and ε = 1e-2 this is 1e-9; for float32, δ = 1e-7, it is 1e-2.

One Richardson step, (4·D(ε/2) − D(ε))/3, removes the term in ε² and leaves about (εh)⁴/4, so that ε need not be small:
ε = 1e-2 gives about 1e-9 in truncation *and* in rounding. It is on by default and takes four retrainings for each
point. Without it, take the ε where both errors meet, about (δN/|I|h²)^⅓: 1e-3 in float64. The remark says how far D(ε)
and D(ε/2) are apart. The extrapolated value is closer to the derivative than that.

What the trainer must do:

- It minimises (1/n)·Σ w_j ℓ_j + (λ/2)‖θ‖², where n counts the points that take part: not the sum of the weights.
- The scores are of the Hessian of the mean loss with the damping λ of the training.
- For 1e-6, the losses must be known to δ ≈ 1e-6·ε|I|/N. A test loss is wrong by up to the gradient norm at which
  training stops times ‖H⁻¹∇ℓ‖: in float64, stop at a norm of 1e-12 or below, which takes Newton steps or L-BFGS.

For a network trained by stochastic gradient descent, the difference is the derivative along the whole path from one
seed. The influence only approximates it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from distinfluence.errors import SettingError
from distinfluence.evaluate.checks.effects import Comparison, Effects
from distinfluence.evaluate.checks.leave_one_out import rank_and_slope, weighted
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
class WeightSteps(PointCheck):
    """A check of scores by a little more and a little less weight on single training points.

    Attributes:
        points: How many training points to take, which ones, or None for all. A number of points is chosen so that
            their scores, summed over the queries, cover the range of the sums.
        queries: How many test points to draw (all if there are not more), which test points, or None for all.
        seeds: Seeds to train from, each time. Convex training needs one.
        step: The step ε in weight, 0 < ε < 1.
        richardson: Whether to train with ε/2 as well, which removes the error in ε².
        draw_seed: Seed of the draw of queries and of the bootstrap.

    Raises:
        SettingError: If a setting is outside of what is possible.
    """

    points: Chosen = 20
    queries: Chosen = 20
    seeds: Sequence[int] = (0,)
    step: float = 1e-2
    richardson: bool = True
    draw_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-8 <= self.step < 1:
            raise SettingError(
                f"`step` must be from 1e-8 to less than 1, got {self.step}. Take 0.01 for losses in float64."
            )

    @override
    def measure(self, method: str, influences: Scores, retrainer: Retrainer) -> Effects:
        """Measure the derivatives of losses by the weights of points, and compare with the scores.

        Args:
            method: Name of the method that the scores are of.
            influences: Scores, [n_test, n_train]; positive where a training point helps.
            retrainer: The retrainer whose data the scores are about; it must train with weights. It is asked once.

        Returns:
            Predicted derivatives −I/N next to measured ones, with the figures of the relative error (of the Frobenius
            norm of the measured derivatives), rank correlation and slope.

        Raises:
            IndexRangeError: If there is no such point or query.
            ShapeError: If the scores are not about the data of the retrainer.
            NonFiniteError: If a score or a loss is not finite.
        """
        queries, n_train = self._queries(retrainer), retrainer.n_train
        points = self.chosen_points(influences, retrainer)
        predicted = -read_scores(influences, retrainer, queries, points) / n_train
        runs = self._retrainings(points, n_train)
        losses = RetrainedLosses.made(retrainer, runs, queries)
        differences = [
            np.stack([self._difference(losses, n_train, int(j), step) for j in points], axis=1) for step in self._steps
        ]
        measured, remark = differences[0], ""
        if self.richardson:
            apart = float(np.linalg.norm(differences[1] - differences[0]) / (np.linalg.norm(differences[1]) or 1.0))
            measured = (4 * differences[1] - differences[0]) / 3
            remark = f"steps of {self.step:g} and half of it differ by {apart:.1e}"
        comparison = Comparison.drawn(predicted, measured.mean(axis=2), self.draw_seed)
        described = Figure("weight steps", method, 0.0, n_queries=len(queries), n_retrainings=len(runs))
        error = replace(described, check="weight steps, relative error", remark=remark)
        figures = (
            comparison.figure(comparison.relative_error(), error),
            *rank_and_slope(comparison, described, measured),
        )
        return Effects(queries, points, predicted, measured, figures)

    @property
    def _steps(self) -> tuple[float, ...]:
        return (self.step, self.step / 2) if self.richardson else (self.step,)

    @override
    def _retrainings(self, points: NDArray[np.int64], n_train: int) -> list[Retraining]:
        signed = [sign * step for step in self._steps for sign in (1, -1)]
        return distinct_retrainings([weighted(n_train, j, 1 + step) for j in points for step in signed], self.seeds)

    def _difference(self, losses: RetrainedLosses, n_train: int, point: int, step: float) -> NDArray[np.float64]:
        """Return the central difference for each query and seed, [q, r]."""
        more, less = (losses.of(weighted(n_train, point, 1 + each), self.seeds) for each in (step, -step))
        return (more - less) / ((1 + step) - (1 - step))  # what the weights differ by after rounding
