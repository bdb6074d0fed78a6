"""What iterations share: stopping, true residuals, starting again from where they are.

An inner iteration solves (A + λI) d = r for the rows that are not done, with r the true residual, until its recurrence
says that a row's residual is small enough. Then one fresh product says whether that is true; rows whose recurrence has
drifted start again from where they are, as long as that still helps.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from distinfluence.errors import SettingError, ShapeError
from distinfluence.solvers.base import (
    Outcome,
    Solution,
    Solver,
    SolverState,
    check_damping,
    check_rhs,
    check_stopping,
    damped,
    row_norms,
    rtol_for,
)

MOST_ITERATIONS = 5_000  # where `maxiter` is None: 10·p, but no more than this


@dataclass(frozen=True)
class DampedState(SolverState):
    """A + damping·I as an iteration sees it."""

    damping: float

    def matmat(self, rows: Tensor) -> Tensor:
        """rows [k, p] · (A + λI); one pass."""
        return damped(self.operator, rows, self.damping)


DampedT = TypeVar("DampedT", bound=DampedState)


@dataclass
class Steps:
    """What an inner iteration did to its rows.

    d: [k, p], the correction. steps: [k]. curvature: [k] float64, the smallest Rayleigh quotient met. largest: the
    largest one, a lower bound of ‖A + λI‖. flat: [k], rows that stopped at curvature that is not positive.
    """

    d: Tensor
    steps: Tensor
    curvature: Tensor
    flat: Tensor
    largest: float = 0.0

    @classmethod
    def none(cls, rhs: Tensor) -> "Steps":
        """Nothing done yet, for rhs [k, p]."""
        k, device = rhs.shape[0], rhs.device
        return cls(
            d=torch.zeros_like(rhs),
            steps=torch.zeros(k, dtype=torch.int64, device=device),
            curvature=torch.full((k,), torch.inf, dtype=torch.float64, device=device),
            flat=torch.zeros(k, dtype=torch.bool, device=device),
        )

    def attainable(self, rows: Tensor) -> Tensor:
        """Residual norms [n] that rounding leaves to these rows, eps·‖A + λI‖·‖d‖: a recurrence below it is fiction."""
        return float(torch.finfo(self.d.dtype).eps) * self.largest * row_norms(self.d[rows])

    @property
    def rounding(self) -> float:
        """10·eps: Rayleigh quotients within ± this of the largest are flat, zero to rounding."""
        return 10 * float(torch.finfo(self.d.dtype).eps)

    @property
    def noise(self) -> float:
        """Rayleigh quotients within ± this are flat: 10·eps·‖A + λI‖."""
        return self.rounding * self.largest


@dataclass(frozen=True)
class IterativeSolver(Solver[DampedT]):
    """Hyperparameters and outer loop of an iteration.

    damping: λ ≥ 0. rtol, atol: a row has converged when ‖rhs − (A + λI) x‖ ≤ max(rtol·‖rhs‖, atol), SciPy's rule, for
    the true residual; an rtol of None is 1e-7 in float64 and 1e-4 in float32. maxiter: iterations of a row, 10·p up to
    5000 if None.
    """

    damping: float
    rtol: float | None = 1e-7
    atol: float = 0.0
    maxiter: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        check_stopping(self.rtol, self.atol)
        if self.maxiter is not None and (type(self.maxiter) is not int or self.maxiter < 1):  # a bool is none
            raise SettingError(f"`maxiter` must be a whole number ≥ 1 or None, got {self.maxiter!r}.")

    def most(self, size: int) -> int:
        """How many steps a row of this many parameters may take."""
        return self.maxiter or min(10 * size, MOST_ITERATIONS)

    @abstractmethod
    def _inner(self, state: DampedT, rhs: Tensor, threshold: Tensor, budget: Tensor) -> Steps:
        """Solve for rhs [k, p] from zero until a row's recurrence is at its threshold [k] or its budget [k] spent."""

    def solve(self, state: DampedT, rhs: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve for rhs [k, p]. x0: [k, p], where to start; zero if None.

        Costs a pass more than there are steps, one for an x0, and one each time that residuals have not fallen for
        PATIENCE steps.
        """
        check_rhs(rhs, state.operator)
        if x0 is not None:
            check_rhs(x0, state.operator, "x0")
            if x0.shape != rhs.shape:
                raise ShapeError(f"`x0` must be {tuple(rhs.shape)} as `rhs` is, got {tuple(x0.shape)}.")
        run = _Run(self, state, rhs, x0)
        while (rows := run.unfinished()).numel():
            run.advance(rows, self._inner(state, run.residual[rows], run.threshold[rows], run.steps_left(rows)))
        return run.solution()


class _Run:
    """The outer loop's view of one solve: where each row is."""

    def __init__(self, solver: IterativeSolver[DampedT], state: DampedT, rhs: Tensor, x0: Tensor | None) -> None:
        self._state = state
        self._rhs = rhs
        k, p = rhs.shape
        self._maxiter = solver.most(p)
        self._rhs_norm = row_norms(rhs)
        # not rhs.clone(): a zero row then returns at once, and step counts mean products
        self._x = torch.zeros_like(rhs) if x0 is None else torch.where(self._rhs_norm[:, None] > 0, x0, 0.0)
        self.residual = rhs.clone() if x0 is None else rhs - state.matmat(self._x)
        self.threshold = (rtol_for(solver.rtol, rhs.dtype) * self._rhs_norm).clamp_min(solver.atol)
        self._norm = row_norms(self.residual)
        self._steps = torch.zeros(k, dtype=torch.int64, device=rhs.device)
        self._curvature = torch.full((k,), torch.inf, dtype=torch.float64, device=rhs.device)
        self._largest = 0.0
        self._outcome: list[Outcome | None] = [
            Outcome.CONVERGED if done else None for done in (self._norm <= self.threshold).tolist()
        ]

    def unfinished(self) -> Tensor:
        """Numbers of the rows that have no outcome yet."""
        return torch.tensor([i for i, o in enumerate(self._outcome) if o is None], device=self._x.device).long()

    def steps_left(self, rows: Tensor) -> Tensor:
        """How many steps each of these rows may still take: the budget of one does not depend on the others."""
        return self._maxiter - self._steps[rows]

    def advance(self, rows: Tensor, inner: Steps) -> None:
        """Add the correction, look at the true residual, and settle what has come to an end."""
        self._largest = max(self._largest, inner.largest)
        before = self._norm[rows]
        x = self._x[rows] + inner.d
        residual = self._rhs[rows] - self._state.matmat(x)
        after = row_norms(residual)
        self._steps[rows] += inner.steps
        # Residuals may rise while the energy of the error falls: a row that only ran out of steps keeps its iterate.
        # Where steps went along flat directions or drifted, a correction that made the residual worse is not taken.
        ran_out = ~inner.flat & (self._steps[rows] >= self._maxiter) & torch.isfinite(after)
        taken = (after < before) | ran_out
        into = rows[taken]
        self._x[into], self.residual[into], self._norm[into] = x[taken], residual[taken], after[taken]
        self._curvature[rows] = torch.minimum(self._curvature[rows], inner.curvature)
        for number, row in enumerate(rows.tolist()):
            self._outcome[row] = self._settle(row, float(before[number]), bool(inner.flat[number]), inner.noise)

    def _settle(self, row: int, before: float, flat: bool, noise: float) -> Outcome | None:
        now = float(self._norm[row])
        if now <= float(self.threshold[row]):
            return Outcome.CONVERGED
        if flat:
            negative = float(self._curvature[row]) < -noise
            return Outcome.NEGATIVE_CURVATURE if negative else Outcome.SINGULAR
        if int(self._steps[row]) >= self._maxiter:
            return Outcome.MAXITER
        if now <= before / 2:
            return None
        # a restart that does not halve the true residual has met the rounding of the products, or a flat direction
        return Outcome.SINGULAR if float(self._curvature[row]) <= noise else Outcome.STAGNATED

    def solution(self) -> Solution:
        relative = torch.where(self._rhs_norm > 0, self._norm / self._rhs_norm, self._norm)
        return Solution(
            x=self._x,
            relative_residual=relative.cpu(),
            iterations=self._steps.cpu(),
            outcome=tuple(outcome for outcome in self._outcome if outcome is not None),
            curvature=torch.where(self._curvature.isinf(), torch.nan, self._curvature).cpu(),
            largest=self._largest or torch.nan,
        )
