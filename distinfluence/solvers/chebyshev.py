"""Chebyshev semi-iteration: the rate of conjugate gradients without their inner products.

The polynomials are fixed by an interval that holds the spectrum of A + λI, so a step is one product and three updates,
and nothing waits for a sum over the parameters: the method for rows that are streamed or spread out. In return the
interval has to be known, which Lanczos finds in `fit`, and rows gain nothing from each other. The number of steps is
known beforehand, about ½·√cond·ln(2/rtol); a stationary iteration with the same cost a step, as LiSSA in full batches,
needs about cond·ln(1/rtol). Reference: Saad (2003), Iterative Methods for Sparse Linear Systems, Algorithm 12.1.

While the spectrum lies in (0, upper], no residual is ever larger than at the start: what is outside of the interval but
in there is only slower. So residuals that grow prove an eigenvalue elsewhere, and they turn into its eigenvector: their
Rayleigh quotient says whether it is above, and by how much, or negative.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields, replace

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator, PlannedWork
from distinfluence.solvers.base import row_norms
from distinfluence.solvers.demand import Demand, SolveWork, Systems, search_work, usual_steps
from distinfluence.solvers.iterative import MOST_ITERATIONS, DampedState, IterativeSolver, Steps
from distinfluence.solvers.spectrum import BLOCK, Extremes, extreme_eigenvalues

SAFETY = 1.02  # times the upper end: beyond the interval polynomials grow, and Lanczos sees ends from inside
NARROW = 8.0  # by which the lower end is divided, where residuals take longer than it says
CHEBYSHEV_STEPS = 60  # of a solve to 1e-7, where only the matrix knows
SWEEPS = 10  # intervals that are tried before the true residuals are looked at
GREW = 2.0  # of a residual at the end of a sweep: an eigenvalue lies outside
GROWTH = 1e3  # of a residual within a sweep: it is that eigenvalue's eigenvector, to a thousandth


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
            if self.extremes.smallest >= 0:
                return self.damping + max(self.extremes.lower, 0.0)
            # Ritz values lie inside: what is left of the damping is less than they say
            return max(self.damping + self.extremes.lower, (self.damping + self.extremes.smallest) / 2)
        return self.extremes.smallest_positive + self.damping

    @property
    def remarks(self) -> tuple[str, ...]:
        """The interval and the steps that it asks for, or that there is none."""
        if not self.usable:
            found = f"its smallest one is about {self.extremes.smallest + self.damping:.3g}: no row will be solved"
        else:
            steps = math.ceil(0.5 * math.sqrt(self.upper / self.lower) * math.log(10))
            found = f"above zero they lie in [{self.lower:.3g}, {self.upper:.3g}]: about {steps} steps for each digit"
        return (f"Chebyshev: eigenvalues of A + λI at λ = {self.damping:.3g}: {found}",)

    @property
    def usable(self) -> bool:
        """Whether there is an interval above zero."""
        definite = self.extremes.smallest + self.damping >= -self.noise  # not so for NaN
        return definite and 0 < self.lower <= self.upper < math.inf

    @property
    def details(self) -> Mapping[str, Tensor]:
        """The interval."""
        return {"interval": torch.tensor([self.lower, self.upper], dtype=torch.float64)}

    def steps(self, gain: float) -> int:
        """How many steps lower residuals by this factor: ½·√cond·ln(2·gain), rounded up."""
        return _steps(self.lower, self.upper, gain)


@dataclass(frozen=True)
class Chebyshev(IterativeSolver[Interval]):
    """Chebyshev semi-iteration.

    It needs A + λI positive definite: rows of an indefinite one end as "negative curvature" without a step.

    Args:
        damping: λ ≥ 0.
        rtol: Relative tolerance. A row has converged when ‖rhs − (A + λI) x‖ ≤ max(rtol·‖rhs‖, atol), as in SciPy, for
            the true residual. None is 1e-7 in float64 and 1e-4 in float32.
        atol: Absolute tolerance.
        maxiter: The largest number of steps of a row; 5000 if None.
        seed: The seed of the start vectors of Lanczos.

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> from distinfluence.curvature import MatrixOperator
    >>> solver = Chebyshev(damping=1.0, rtol=1e-6)
    >>> state = solver.fit(MatrixOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))))
    >>> solver.solve(state, torch.tensor([[2.0, 4.0]], dtype=torch.float64)).x.round(decimals=5)
    tensor([[1., 1.]], dtype=torch.float64)
    """

    seed: int = 0

    @override
    def demand(self, systems: Systems) -> Demand:
        # Lanczos for the ends of the spectrum first; more steps than of conjugate gradients, but nothing else
        fit = sum((search_work(block.size, BLOCK) for block in systems.blocks), PlannedWork())
        solve = SolveWork(usual_steps(self.rtol, systems.dtype, CHEBYSHEV_STEPS))
        return Demand(row_vectors=10.0, fit=fit, solve=solve, fit_rows=BLOCK)

    @override
    def fit(self, operator: CurvatureOperator) -> Interval:
        # The ends of the spectrum, by Lanczos: 5 to 40 passes of 4 rows.
        return Interval(operator, self.damping, extreme_eigenvalues(operator, seed=self.seed))

    @override
    def most(self, size: int) -> int:
        return self.maxiter or MOST_ITERATIONS

    @override
    def adapt(self, state: Interval) -> Interval:
        return replace(state, damping=self.damping)

    @override
    def state_arrays(self, state: Interval) -> dict[str, Tensor]:
        return {"extremes": torch.tensor(astuple(state.extremes), dtype=torch.float64)}

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> Interval:
        values = dict(zip((field.name for field in fields(Extremes)), arrays["extremes"].tolist(), strict=True))
        return Interval(operator, self.damping, Extremes(**values | {"passes": int(values["passes"])}))

    def _inner(self, state: Interval, rhs: Tensor, threshold: Tensor, budget: Tensor) -> Steps:
        result = Steps.none(rhs)
        smallest = state.extremes.smallest + state.damping
        result.curvature[:] = smallest
        result.largest = state.extremes.norm + state.damping
        if not state.usable:
            result.flat[:] = True
            result.steps += 1
            return result
        sweep = _Sweep(state, rhs, threshold, budget, result)
        lower, upper = state.lower, state.upper
        for _ in range(SWEEPS):
            before = sweep.size
            grew = sweep.run(lower, upper, _steps(lower, upper, float((before / sweep.threshold).max())))
            if not sweep.rows.numel():
                break
            if grew:
                below, above = sweep.outside()
                result.curvature[sweep.rows] = min(smallest, below)
                if below < -state.noise:
                    result.flat[sweep.rows] = True
                    break
                if not above < math.inf:
                    break
                if above > upper:
                    upper = SAFETY * above
                    continue
            elif smallest <= state.noise and bool((sweep.size > before[sweep.left] / 2).any()):
                result.flat[sweep.rows] = True  # what does not fall lies in the null space
                break
            lower /= NARROW  # an eigenvalue lies below: that only slows them down
            if lower < state.noise:
                break
        return result


class _Sweep:
    """Saad's Algorithm 12.1 from where the rows are, on one interval after the other.

    rows: [n], numbers of those that are not done. threshold, size: [n]. left: which of the rows of the last run are.
    """

    def __init__(self, state: Interval, rhs: Tensor, threshold: Tensor, budget: Tensor, result: Steps) -> None:
        self._state, self._budget, self._result = state, budget, result
        self.rows = torch.arange(rhs.shape[0], device=rhs.device)
        self.threshold = threshold
        self._r = rhs
        self._grown = rhs[:0]
        self.size = row_norms(rhs)
        self.left = torch.ones_like(self.rows, dtype=torch.bool)

    def run(self, lower: float, upper: float, steps: int) -> bool:
        """So many steps; whether residuals grew, of which nothing is kept but the steps that rows took."""
        centre, half = (upper + lower) / 2, (upper - lower) / 2
        rows, r, start = self.rows, self._r.clone(), self.size
        total, d, rho = torch.zeros_like(r), r / centre, half / centre
        keep = torch.ones_like(rows, dtype=torch.bool)
        size = start
        for _ in range(steps):
            total[keep] += d
            image = self._state.matmat(d)  # before r[keep], which is a copy
            r[keep] -= image
            del image
            self._result.steps[rows[keep]] += 1
            size = row_norms(r)
            on = (size > self.threshold) & (self._result.steps[rows] < self._budget[rows])
            if not bool((size <= GROWTH * start).all()) or not on.any():
                keep &= on
                break
            after = 1 / (2 * centre / half - rho) if half > 0 else 0.0
            d = d[on[keep]].mul_(after * rho).add_(r[on], alpha=2 * after / half if half > 0 else 1 / centre)
            keep, rho = on, after
        sound = size <= GREW * start  # not so for NaN
        self._result.d[rows[sound]] += total[sound]
        self._grown = r[~sound]
        r[~sound], size = self._r[~sound], torch.where(sound, size, start)
        # rows that grew go on, with what is left of their budget
        keep |= ~sound & (self._result.steps[rows] < self._budget[rows])
        self.left = keep
        self.rows, self._r, self.size, self.threshold = rows[keep], r[keep], size[keep], self.threshold[keep]
        return bool((~sound).any())

    def outside(self) -> tuple[float, float]:
        """Smallest Rayleigh quotient of the residuals that grew, and the largest one plus its error; one pass."""
        grown = self._grown / row_norms(self._grown)[:, None].to(self._grown.dtype)
        product = self._state.matmat(grown).double()
        quotients = (grown * product).sum(dim=1)
        error = row_norms(product - quotients[:, None] * grown)
        return float(quotients.min()), float((quotients + error).max())


def _steps(lower: float, upper: float, gain: float) -> int:
    if not 0 < lower <= upper < math.inf:
        return 1
    return math.ceil(0.5 * math.sqrt(upper / lower) * math.log(2 * max(gain, 1.0))) + 1
