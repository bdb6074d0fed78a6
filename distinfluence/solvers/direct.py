"""Solve with a dense factorisation of A + λI, made once.

Cost: p products for the matrix (`operator.dense`), p³/3 flops for its Cholesky factor, 2·p² for each right-hand side.
Memory: the matrix and its factor, 16·p² bytes. All in float64. A matrix that is indefinite, or singular to rounding, is
factorised by eigenvalues instead (9·p³ flops or so), and said so.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.errors import NonFiniteError
from distinfluence.solvers.base import Outcome, Solution, Solver, check_damping, check_rhs, check_tolerance


@dataclass(frozen=True)
class Factorisation:
    """A + λI and its factorisation, float64.

    matrix: [p, p]. factor: the lower Cholesky factor [p, p], or the eigenvectors as columns. eigenvalues: [p] with
    the eigenvectors, ascending; empty with a Cholesky factor.
    """

    operator: CurvatureOperator
    matrix: Tensor
    factor: Tensor
    eigenvalues: Tensor

    @property
    def positive_definite(self) -> bool:
        """Whether A + λI has only positive eigenvalues."""
        return not self.eigenvalues.numel() or float(self.eigenvalues[0]) > self.noise

    @property
    def noise(self) -> float:
        """Eigenvalues within ± this are zero to rounding: p·eps·‖A + λI‖; 0 with a Cholesky factor."""
        return _rounding(self.matrix) * float(self.eigenvalues.abs().amax()) if self.eigenvalues.numel() else 0.0


@dataclass(frozen=True)
class Direct(Solver[Factorisation]):
    """Dense factorisation: exact to rounding.

    damping: λ ≥ 0. rtol: residual norm relative to ‖rhs‖ above which a row counts as not solved: a backward stable
    solve leaves about eps·cond(A + λI), so that 1e-6 is missed only beyond cond ≈ 1e10, where few digits of x are
    right. Rows in float32 may miss it by the rounding of x itself, up to 1e-2.
    Reference: Golub & Van Loan (2013), Matrix Computations, sections 4.2 and 8.3.
    """

    damping: float
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_tolerance("rtol", self.rtol)

    def fit(self, operator: CurvatureOperator) -> Factorisation:
        """Make the matrix and factorise it. Raises NonFiniteError if it has NaN or infinity."""
        matrix = operator.dense()
        bad = int((~matrix.isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"`operator` must be finite, got NaN or infinity in {bad} of {matrix.numel()} entries. "
                "Look at the loss and at its second derivatives."
            )
        matrix.diagonal().add_(self.damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        eigenvalues = matrix.new_empty(0)
        # whether Cholesky fails on a singular matrix is up to rounding: a pivot within it counts as failed
        pivots = factor.diagonal() ** 2
        if int(failed) or bool(pivots.min() <= 10 * _rounding(matrix) * matrix.diagonal().max()):
            eigenvalues, factor = torch.linalg.eigh(matrix)
        return Factorisation(operator, matrix, factor, eigenvalues)

    def solve(self, state: Factorisation, rhs: Tensor) -> Solution:
        """Two triangular solves, or the eigenvectors; the residual from the dense matrix."""
        check_rhs(rhs, state.operator)
        b = rhs.double()
        x = _eigen_solve(state, b) if state.eigenvalues.numel() else _cholesky_solve(state, b)
        x = x.to(rhs.dtype)
        norms = b.norm(dim=1)
        residual = (b - x.double() @ state.matrix).norm(dim=1)
        relative = torch.where(norms > 0, residual / norms, residual).cpu()
        solved = (residual <= self.rtol * norms + _excused(state, x, norms)).cpu()
        smallest = float(state.eigenvalues[0]) if state.eigenvalues.numel() else float("nan")
        k = rhs.shape[0]
        return Solution(
            x=x,
            relative_residual=relative,
            iterations=torch.zeros(k, dtype=torch.int64),
            outcome=tuple(Outcome.CONVERGED if ok else Outcome.SINGULAR for ok in solved.tolist()),
            curvature=torch.full((k,), smallest, dtype=torch.float64),
        )

    def state_arrays(self, state: Factorisation) -> dict[str, Tensor]:
        """Matrix and factorisation."""
        return {"matrix": state.matrix, "factor": state.factor, "eigenvalues": state.eigenvalues}

    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> Factorisation:
        """No product and no factorisation."""
        return Factorisation(operator, arrays["matrix"], arrays["factor"], arrays["eigenvalues"])


def _cholesky_solve(state: Factorisation, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b.T, state.factor).T.contiguous()


def _eigen_solve(state: Factorisation, b: Tensor) -> Tensor:
    """The minimum-norm solution: eigenvalues that are zero to rounding have no inverse."""
    zero = state.eigenvalues.abs() <= state.noise
    inverse = torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, state.eigenvalues))
    return (b @ state.factor * inverse) @ state.factor.T


def _excused(state: Factorisation, x: Tensor, norms: Tensor) -> Tensor:
    """The residual [k] that rounding x to a dtype below float64 leaves: eps·‖A‖·‖x‖, up to a percent of ‖rhs‖ [k]."""
    if x.dtype == torch.float64:  # as the factorisation: nothing was rounded away
        return torch.zeros_like(norms)
    rounding = torch.finfo(x.dtype).eps * state.matrix.abs().sum(dim=1).max() * x.double().norm(dim=1)
    return torch.minimum(rounding, 1e-2 * norms)


def _rounding(matrix: Tensor) -> float:
    """p·eps: what rounding does to the eigenvalues of a matrix [p, p], relative to its norm."""
    return matrix.shape[0] * torch.finfo(matrix.dtype).eps
