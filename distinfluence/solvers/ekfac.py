"""Solving with a matrix whose eigenvectors are known: KFAC and EKFAC. Exact for that matrix, with any damping.

    (A + λI)⁻¹ V = Q_left [ (Q_leftᵀ V Q_right) / (Λ + λ) ] Q_rightᵀ        in each unit

How far that matrix is from the curvature of the loss is another question: see `EkfacInfluence`. As a preconditioner it
needs no more than to be close. Reference: George et al. (2018), section 3.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import BlockDamped, CurvatureOperator, SupportsEigenbasis
from distinfluence.errors import SettingError, ShapeError, UnsupportedOperatorError
from distinfluence.solvers.base import (
    Outcome,
    Solution,
    Solver,
    SolverState,
    check_damping,
    check_rhs,
    check_tolerance,
    damped,
    relative_residuals,
    rtol_for,
)
from distinfluence.solvers.cg import CG
from distinfluence.solvers.residuals import (
    measured_of,
    some_residuals,
)

APPROXIMATE = "The Kronecker-factored matrix approximates the Gauss–Newton matrix, to which residuals refer: "


@dataclass(frozen=True)
class EigenbasisState(SolverState):
    """The operator, with its eigenvalues looked at once. smallest, largest: of A."""

    smallest: float
    largest: float
    damping: float

    @property
    def positive_definite(self) -> bool:
        """Whether A + λI has only positive eigenvalues, beyond rounding."""
        return self.smallest + self.damping > self.noise

    @property
    def smallest_eigenvalue(self) -> float:
        """Of A."""
        return self.smallest

    @property
    def noise(self) -> float:
        """Eigenvalues below this are zero: p·eps of the largest, as for a pseudo-inverse."""
        eps = float(torch.finfo(self.operator.dtype).eps)
        return eps * self.largest * math.sqrt(self.operator.size)

    def inverse_values(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Return the function of the eigenvalues that makes (A + λI)⁻¹, or the pseudo-inverse."""
        return functools.partial(inverse_values, damping=damping, noise=self.noise)

    def inverse(self, rhs: Tensor, damping: float) -> Tensor:
        """rhs [k, p] · (A + λI)⁻¹, of which no residual is measured."""
        check_rhs(rhs, self.operator)
        assert isinstance(self.operator, SupportsEigenbasis)
        return self.operator.in_eigenbasis(rhs, self.inverse_values(damping))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is done with directions that have no curvature."""
        if self.smallest + self.damping > self.noise or self.smallest < -self.noise:
            return ()
        return ("λ = 0 and A is singular: its pseudo-inverse is taken, and directions without curvature are lost.",)


@dataclass(frozen=True)
class Ekfac(Solver[EigenbasisState]):
    """The inverse through known eigenvectors.

    Args:
        damping: λ ≥ 0; a singular matrix with λ = 0 gets its pseudo-inverse.
        rtol: The relative residual up to which a row counts as solved; what rounding leaves if None.

    Raises:
        SettingError: If a hyperparameter is out of range.
    """

    damping: float
    rtol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        if self.rtol is not None:
            check_tolerance("rtol", self.rtol)

    @override
    def fit(self, operator: CurvatureOperator) -> EigenbasisState:
        # Look at the eigenvalues. Raises UnsupportedOperatorError for an operator without an eigenbasis.
        if not isinstance(operator, SupportsEigenbasis):
            raise UnsupportedOperatorError(
                f"`Ekfac` needs an operator whose eigenvectors are known; {type(operator).__name__} has none. Use "
                "`Direct(eigen=True)`, or `EkfacInfluence`, which makes a Kronecker-factored one."
            )
        values = operator.eigenvalues()
        return EigenbasisState(operator, float(values.min()), float(values.max()), self.damping)

    @override
    def adapt(self, state: EigenbasisState) -> EigenbasisState:
        return EigenbasisState(state.operator, state.smallest, state.largest, self.damping)

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> EigenbasisState:
        return self.fit(operator)

    @override
    def solve(self, state: EigenbasisState, rhs: Tensor) -> Solution:
        # Solve for rhs [k, p]; 8·(o²·i + o·i²) flops a row and unit, half of them for its residual.
        x = state.inverse(rhs, self.damping)
        relative = relative_residuals(rhs, damped(state.operator, x, self.damping))
        rtol = rtol_for(self.rtol, rhs.dtype)
        otherwise = Outcome.STAGNATED if state.positive_definite else Outcome.SINGULAR
        return Solution(
            x=x,
            relative_residual=relative,
            iterations=torch.zeros(rhs.shape[0], dtype=torch.int64),
            outcome=tuple(Outcome.CONVERGED if r <= rtol else otherwise for r in relative.tolist()),
            curvature=torch.full((rhs.shape[0],), state.smallest + self.damping, dtype=torch.float64),
            largest=state.largest + self.damping,
        )


def inverse_values(values: Tensor, damping: float, noise: float) -> Tensor:
    """1 / (Λ + λ), and 0 where that is zero to rounding."""
    shifted = values + damping
    counts = shifted.abs() > noise
    return torch.where(counts, 1.0 / torch.where(counts, shifted, 1.0), 0.0)


@dataclass(frozen=True)
class ExactSystem:
    """The system over all blocks that Kronecker-factored ones approximate: factors are refined or measured by it.

    operator: the exact A, over all blocks. columns: block → its columns. cg_iterations: steps of conjugate gradients
    from EKFAC as preconditioner. residual_rows: how many rows are measured where there are no such steps.
    """

    operator: CurvatureOperator
    columns: Mapping[str, slice]
    cg_iterations: int
    residual_rows: int

    @property
    def is_measured(self) -> bool:
        """Whether solves sweep over the data, and say how far they are off."""
        return self.cg_iterations > 0 or self.residual_rows > 0

    def damped(self, damping: Mapping[str, float]) -> tuple[CurvatureOperator, float]:
        """Return (A with what each block's λ is above the least, the least λ)."""
        least = min(damping.values())
        if all(value == least for value in damping.values()):
            return self.operator, least
        added = torch.zeros(self.operator.size, dtype=self.operator.dtype, device=self.operator.device)
        for block, columns in self.columns.items():
            added[columns] = damping[block] - least
        return BlockDamped(self.operator, added), least

    def solve(
        self, states: Mapping[str, EigenbasisState], rhs: Mapping[str, Tensor], damping: Mapping[str, float]
    ) -> Solution:
        """Solve for rhs, block → [k, p_block], by the inverses of the blocks; refined if asked: x [k, p]."""
        operator, least = self.damped(damping)
        k = next(iter(rhs.values())).shape[0]
        if self.cg_iterations and k:
            steps = CG(least, rtol=None, maxiter=self.cg_iterations, preconditioner=_Blocks(states, self, damping))
            solution = steps.solve(steps.fit(operator), torch.cat(list(rhs.values()), dim=1))
            return replace(solution, outcome=_outcomes(solution.relative_residual, solution.x.dtype))
        x = torch.cat([states[block].inverse(rows, damping[block]) for block, rows in rhs.items()], dim=1)
        relative = torch.full((k,), torch.nan, dtype=torch.float64)
        if self.residual_rows:
            relative = some_residuals(operator, least, torch.cat(list(rhs.values()), dim=1), x, self.residual_rows)
        return Solution(
            x=x,
            relative_residual=relative,
            iterations=torch.zeros(k, dtype=torch.int64),
            outcome=_outcomes(relative, x.dtype),
            curvature=torch.full((k,), torch.nan, dtype=torch.float64),
            remarks=(APPROXIMATE + measured_of(min(k, self.residual_rows), k),),
        )


def _outcomes(relative: Tensor, dtype: torch.dtype) -> tuple[Outcome, ...]:
    rtol = rtol_for(None, dtype)
    return tuple(Outcome.CONVERGED if r <= rtol else Outcome.APPROXIMATE for r in relative.tolist())


@dataclass(frozen=True)
class _Blocks:
    """EKFAC with each block's own λ as a preconditioner of the matrix over all blocks."""

    states: Mapping[str, EigenbasisState]
    system: ExactSystem
    damping: Mapping[str, float]

    def fit(self, operator: CurvatureOperator, damping: float) -> Self:
        """Nothing to fit."""
        return self

    def apply(self, rows: Tensor) -> Tensor:
        """rows [k, p] · M⁻¹."""
        parts = []
        for block, columns in self.system.columns.items():
            operator, own = self.states[block].operator, self.damping[block]
            assert isinstance(operator, SupportsEigenbasis)
            parts.append(operator.in_eigenbasis(rows[:, columns], lambda values, own=own: 1.0 / (values + own)))  # type: ignore[misc]
        return torch.cat(parts, dim=1)


class SupportsInverse(Protocol):
    """The inverse of a fitted Kronecker-factored matrix."""

    @property
    def n_parameters(self) -> int:
        """p."""

    def inverse(self, rows: Tensor, damping: float) -> Tensor:
        """rows [k, p] · (A + λI)⁻¹, with columns in the order of the model's parameters."""


@runtime_checkable
class SupportsKroneckerInverse(Protocol):
    """A fitted `EkfacInfluence`, as far as a preconditioner needs it."""

    def kronecker_inverse(self) -> SupportsInverse:
        """Return the inverse, without model and data."""


@dataclass(frozen=True)
class EkfacInverse:
    """M⁻¹ of a fitted EKFAC at a damping."""

    ekfac: SupportsInverse
    damping: float

    def apply(self, rows: Tensor) -> Tensor:
        """rows [k, p] · M⁻¹."""
        return self.ekfac.inverse(rows, self.damping)

    def at(self, damping: float) -> "EkfacInverse":
        """Return the same inverse at another λ."""
        return EkfacInverse(self.ekfac, damping)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What it is."""
        return (f"EKFAC preconditioner: {self.ekfac!r}",)


@dataclass(frozen=True)
class EkfacPreConditioner:
    """A fitted EKFAC as a preconditioner of the Hessian or Gauss–Newton matrix of the same model, in one block.

    A few iterations from it give better scores than many without. To a tight tolerance it may take more iterations than
    no preconditioner at all: measure.

    Args:
        ekfac: A fitted `EkfacInfluence`, of which only the factors are kept.

    Raises:
        NotFittedError: If it is not fitted.
    """

    ekfac: SupportsInverse | SupportsKroneckerInverse

    def __post_init__(self) -> None:
        if isinstance(self.ekfac, SupportsKroneckerInverse):
            object.__setattr__(self, "ekfac", self.ekfac.kronecker_inverse())

    def fit(self, operator: CurvatureOperator, damping: float) -> EkfacInverse:
        """Return the inverse at this damping; there is nothing to fit.

        Args:
            operator: The curvature A, over all parameters of the EKFAC.
            damping: λ > 0.

        Returns:
            M⁻¹.

        Raises:
            ShapeError: If the operator has another size.
            SettingError: If λ is not above 0.
        """
        assert not isinstance(self.ekfac, SupportsKroneckerInverse)
        if self.ekfac.n_parameters != operator.size:
            raise ShapeError(
                f"`EkfacPreConditioner` covers {self.ekfac.n_parameters} parameters, got an operator of "
                f"{operator.size}. Fit it to the same model, and use it with block_structure='full'."
            )
        if damping <= 0:
            raise SettingError(
                f"`hessian_regularization` must be > 0 with an EKFAC preconditioner, got {damping!r}: without damping "
                "it may be singular."
            )
        return EkfacInverse(self.ekfac, damping)
