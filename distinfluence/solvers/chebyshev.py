"""Chebyshev semi-iteration: the rate of conjugate gradients without their inner products.

The polynomials are fixed by an interval that holds the spectrum of A + λI, so a step is one product and three updates,
and nothing waits for a sum over the parameters: the method for rows that are streamed or spread out. In return the
interval has to be known, which Lanczos finds in `fit`, and rows gain nothing from each other. The number of steps is
known beforehand, about ½·√cond·ln(2/rtol); a stationary iteration with the same cost a step, as LiSSA in full batches,
needs about ½·cond·ln(1/rtol). Memory: four blocks of rows. Reference: Saad (2003), Iterative Methods for Sparse Linear
Systems, Algorithm 12.1.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields, replace

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.solvers.base import row_norms
from distinfluence.solvers.iterative import MOST_ITERATIONS, DampedState, IterativeSolver, Steps
from distinfluence.solvers.spectrum import Extremes, extreme_eigenvalues

SAFETY = 1.02  # times the upper end: beyond the interval polynomials grow, and Lanczos sees ends from inside
WIDEN = 1.5  # times the upper end, where residuals grow all the same
NARROW = 8.0  # by which the lower end is divided, where residuals take longer than it says
GROWTH = 1e3  # of a residual that shows that an eigenvalue lies outside


@dataclass(frozen=True)
class Interval(DampedState):
    """The ends of the spectrum of A, as Lanczos found them, with the damping."""

    extremes: Extremes

    @property
    def positive_definite(self) -> bool:
        """Whether A + λI is, as far as Lanczos saw."""
        return self.extremes.smallest + self.damping > self.noise

    @property
    def smallest_eigenvalue(self) -> float:
        """The lower end less its residual; an estimate."""
        return self.extremes.lower

    @property
    def noise(self) -> float:
        """Eigenvalues within ± this are zero to the rounding of products."""
        eps = float(torch.finfo(self.operator.dtype).eps)
        return 10 * math.sqrt(self.operator.size) * eps * (self.extremes.norm + self.damping)

    @property
    def upper(self) -> float:
        """Above all eigenvalues of A + λI."""
        return SAFETY * (self.extremes.upper + self.damping)

    @property
    def lower(self) -> float:
        """Below the eigenvalues of A + λI, or below those that are not zero to rounding without damping."""
        if self.operator.positive_semidefinite and self.damping > 0:
            return self.damping
        if self.damping > self.noise:
            return self.damping + max(self.extremes.lower, 0.0)
        return self.extremes.smallest_positive + self.damping

    @property
    def details(self) -> Mapping[str, Tensor]:
        """The interval."""
        return {"interval": torch.tensor([self.lower, self.upper], dtype=torch.float64)}

    def steps(self, gain: float) -> int:
        """How many steps lower residuals by this factor: ½·√cond·ln(2·gain), rounded up."""
        return _steps(self.lower, self.upper, gain)


@dataclass(frozen=True)
class Chebyshev(IterativeSolver[Interval]):
    """Chebyshev semi-iteration; hyperparameters as `IterativeSolver`. seed: of the start vectors of Lanczos.

    Needs A + λI positive definite: rows of an
    indefinite one end as "negative curvature" without a step.

    >>> import torch
    >>> from distinfluence.curvature import MatrixOperator
    >>> solver = Chebyshev(damping=1.0, rtol=1e-6)
    >>> state = solver.fit(MatrixOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))))
    >>> solver.solve(state, torch.tensor([[2.0, 4.0]], dtype=torch.float64)).x.round(decimals=5)
    tensor([[1., 1.]], dtype=torch.float64)
    """

    seed: int = 0

    def fit(self, operator: CurvatureOperator) -> Interval:
        """The ends of the spectrum, by Lanczos: 5 to 40 passes of 4 rows."""
        return Interval(operator, self.damping, extreme_eigenvalues(operator, seed=self.seed))

    def most(self, size: int) -> int:
        """How many steps a row may take: 5000 if not said. They depend on the condition alone, never on p."""
        return self.maxiter or MOST_ITERATIONS

    def adapt(self, state: Interval) -> Interval:
        """The same ends: no products."""
        return replace(state, damping=self.damping)

    def state_arrays(self, state: Interval) -> dict[str, Tensor]:
        """The ends of the spectrum."""
        return {"extremes": torch.tensor(astuple(state.extremes), dtype=torch.float64)}

    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> Interval:
        """No product."""
        values = dict(zip((field.name for field in fields(Extremes)), arrays["extremes"].tolist(), strict=True))
        return Interval(operator, self.damping, Extremes(**values | {"passes": int(values["passes"])}))

    def _inner(self, state: Interval, rhs: Tensor, threshold: Tensor, budget: Tensor) -> Steps:
        result = Steps.none(rhs)
        smallest = state.extremes.smallest + state.damping
        result.curvature[:] = smallest
        result.largest = state.extremes.norm + state.damping
        lower, upper = state.lower, state.upper
        if not (smallest >= -state.noise and lower > 0 and upper < math.inf):  # NaN ends here, too
            result.flat[:] = True
            result.steps += 1
            return result
        sweep = _Sweep(state, rhs, threshold, budget, result)
        while sweep.rows.numel():
            before = sweep.size
            gain = float((before / sweep.threshold).max())
            if not sweep.run(lower, upper, _steps(lower, upper, gain)):
                upper *= WIDEN  # an eigenvalue lies above
                continue
            if not sweep.rows.numel():
                break
            if smallest <= state.noise and bool((sweep.size > before[sweep.left] / 2).any()):
                result.flat[sweep.rows] = True  # what does not fall lies in the null space
                break
            lower /= NARROW  # an eigenvalue lies below: that only slows them down
        return result


class _Sweep:
    """Saad's Algorithm 12.1 from where the rows are, on one interval after the other.

    rows: [n], numbers of those that are not done. threshold, size: [n]. left: which of the rows of the last run are.
    """

    def __init__(self, state: Interval, rhs: Tensor, threshold: Tensor, budget: Tensor, result: Steps) -> None:
        self._state, self._budget, self._result = state, budget, result
        self.rows = torch.arange(rhs.shape[0], device=rhs.device)
        self.threshold = threshold
        self._r = rhs.clone()
        self.size = row_norms(rhs)
        self.left = torch.ones_like(self.rows, dtype=torch.bool)

    def run(self, lower: float, upper: float, steps: int) -> bool:
        """So many steps; False, with nothing but the steps taken, if residuals grow: the interval is too narrow."""
        centre, half = (upper + lower) / 2, (upper - lower) / 2
        rows, r, start = self.rows, self._r, self.size
        total, d, rho = torch.zeros_like(r), r / centre, half / centre
        keep = torch.ones_like(rows, dtype=torch.bool)
        for _ in range(steps):
            total[keep] += d
            r[keep] -= self._state.matmat(d)
            self._result.steps[rows[keep]] += 1
            size = row_norms(r)
            if not bool((size <= GROWTH * start).all()):
                r += self._state.matmat(total)
                return False
            on = (size > self.threshold) & (self._result.steps[rows] < self._budget[rows])
            if not on.any():
                keep = on
                break
            after = 1 / (2 * centre / half - rho) if half > 0 else 0.0
            d = after * rho * d[on[keep]] + (2 * after / half if half > 0 else 1 / centre) * r[on]
            keep, rho = on, after
        self._result.d[rows] += total
        self.left = keep
        self.rows, self._r, self.size, self.threshold = rows[keep], r[keep], row_norms(r[keep]), self.threshold[keep]
        return True


def _steps(lower: float, upper: float, gain: float) -> int:
    if not 0 < lower <= upper < math.inf:
        return 1
    return math.ceil(0.5 * math.sqrt(upper / lower) * math.log(2 * max(gain, 1.0))) + 1
