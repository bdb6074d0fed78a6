"""What plain and block conjugate gradients share: the preconditioner, and a watch over drifting residuals."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator, PlannedWork
from distinfluence.solvers.base import row_norms
from distinfluence.solvers.demand import (
    PRECONDITIONED_STEPS,
    SKETCHING,
    USUAL_STEPS,
    Demand,
    SolveWork,
    System,
    Systems,
    usual_steps,
)
from distinfluence.solvers.iterative import DampedState, IterativeSolver, Steps
from distinfluence.solvers.preconditioner import (
    FittedPreconditioner,
    Preconditioner,
    SupportsDamping,
    SupportsDemand,
    SupportsStorage,
)

PATIENCE = 100  # steps in which the residuals must fall by a tenth, or the true ones are looked at, once


@dataclass(frozen=True)
class CgState(DampedState):
    """A + λI with its preconditioner, as conjugate gradients see it: the state of a fit."""

    preconditioner: FittedPreconditioner | None

    def precondition(self, rows: Tensor) -> Tensor:
        """rows · M⁻¹; the rows themselves without a preconditioner."""
        return rows if self.preconditioner is None else self.preconditioner.apply(rows)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Those of the preconditioner."""
        return tuple(getattr(self.preconditioner, "remarks", ()))


@dataclass(frozen=True)
class ConjugateSolver(IterativeSolver[CgState]):
    """Conjugate gradients; hyperparameters as `IterativeSolver`, and preconditioner: see `Preconditioner`."""

    preconditioner: Preconditioner | None = None

    def _row_vectors(self) -> float:
        """Vectors [p] that a solve holds for each row."""
        return 11.0 + (self.preconditioner is not None)

    @override
    def demand(self, systems: Systems) -> Demand:
        # solutions, residuals, directions, their images, and copies while blocks are made orthonormal
        rank = getattr(self.preconditioner, "rank", 0) or 0
        state = rank * systems.vector_bytes
        steps = USUAL_STEPS if self.preconditioner is None else PRECONDITIONED_STEPS
        return Demand(
            SKETCHING * state,
            state,
            self._row_vectors(),
            fit=sum((self._preconditioning(block) for block in systems.blocks), PlannedWork()),
            solve=self._solving(usual_steps(self.rtol, systems.dtype, steps), rank, sum(systems.sizes)),
            fit_rows=max(1, rank),
        )

    def _preconditioning(self, block: System) -> PlannedWork:
        """Return the work of fitting the preconditioner; a pass where it does not say."""
        if self.preconditioner is None:
            return PlannedWork()
        if isinstance(self.preconditioner, SupportsDemand):
            return PlannedWork(*self.preconditioner.demand(block.size))
        return PlannedWork(1, 1)

    def _solving(self, steps: int, rank: int, size: int) -> SolveWork:
        """Return the work of a solve. size: p over all blocks."""
        return SolveWork(steps, row_flops=4.0 * rank * size * steps)

    @override
    def fit(self, operator: CurvatureOperator) -> CgState:
        # Fit the preconditioner, if there is one.
        fitted = None if self.preconditioner is None else self.preconditioner.fit(operator, self.damping)
        return CgState(operator, self.damping, fitted)

    @override
    def adapt(self, state: CgState) -> CgState:
        # The preconditioner at the new damping, if it can; else it is fitted again.
        if state.damping == self.damping:
            return state
        if state.preconditioner is None:
            return CgState(state.operator, self.damping, None)
        if isinstance(state.preconditioner, SupportsDamping):
            return CgState(state.operator, self.damping, state.preconditioner.at(self.damping))
        return self.fit(state.operator)

    @override
    def state_arrays(self, state: CgState) -> dict[str, Tensor]:
        stored = isinstance(self.preconditioner, SupportsStorage) and state.preconditioner is not None
        return self.preconditioner.arrays(state.preconditioner) if stored else {}  # type: ignore[union-attr]

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> CgState:
        if isinstance(self.preconditioner, SupportsStorage):
            return CgState(operator, self.damping, self.preconditioner.restore(operator, self.damping, arrays))
        return self.fit(operator)


class DriftWatch:
    """Finds rows whose recurrence has left the truth: they wander in rounding errors and must start again.

    Residuals that do not fall are no sign of that: conjugate gradients lower the energy in each step, while the
    residual may stay on a plateau for hundreds. So they only say when to look, at the price of one pass.
    """

    def __init__(self, state: CgState, rhs: Tensor) -> None:
        self._state = state
        self._rhs = rhs
        self._best = torch.inf
        self._since = 0

    def sound(self, active: Tensor, rows: Tensor, result: Steps, recurrence: Tensor, ratio: Tensor) -> Tensor:
        """Which of the active rows [n] may go on, [n] bool.

        rows: [n], their numbers in `result`. recurrence: [n, p], their residuals. ratio: [n], those over the threshold.
        """
        if not active.any() or not self._stuck(float(ratio[active].log().mean())):
            return active
        true = self._rhs[rows] - self._state.matmat(result.d[rows])
        drifted = row_norms(true - recurrence) > row_norms(true) / 2
        # beside flat directions a plateau is the part of the rhs in them: it stays
        return active & ~drifted & (result.curvature[rows] > result.noise)

    def _stuck(self, level: float) -> bool:
        self._since += 1
        if level < self._best - 0.1:
            self._best, self._since = level, 0
        if self._since < PATIENCE:
            return False
        self._best, self._since = level, 0
        return True
