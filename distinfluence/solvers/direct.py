"""Solve with a dense factorisation of A + λI, made once.

Cost: p products for the matrix (`operator.dense`), p³/3 flops for its Cholesky factor, 2·p² for each right-hand side.
Memory: the matrix and its factor, 16·p² bytes. All in float64. An indefinite matrix has an LU factorisation instead
(2·p³/3 flops), and says so; one that is singular to rounding is decomposed by eigenvalues (9·p³ flops or so), for the
solution of least norm. Another λ costs another factorisation of the matrix that is there; with eigenvalues, nothing.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator, MatrixOperator, PlannedWork
from distinfluence.errors import NonFiniteError
from distinfluence.solvers.base import (
    Outcome,
    Solution,
    Solver,
    SolverState,
    check_damping,
    check_rhs,
    check_tolerance,
    row_norms,
)
from distinfluence.solvers.demand import DENSE_BYTES, EIGEN_BYTES, EIGEN_FLOPS, Demand, SolveWork, Systems
from distinfluence.solvers.spectrum import extreme_eigenvalues

EIGEN_PAYS = 16  # dampings from which one eigendecomposition is cheaper than a Cholesky factor for each

ENDS, MOST_PRODUCTS = 1e-6, 300  # residual of an indefinite matrix's smallest eigenvalue by ‖A‖, and products for it


@dataclass(frozen=True)
class Factorisation(SolverState):
    """A [p, p] and the factorisation of A + damping·I, float64.

    factor: the lower Cholesky factor of A + damping·I [p, p], its LU factorisation, or the eigenvectors of A as
    columns. pivots: of the LU factorisation, else empty. eigenvalues: those of A, [p], ascending, with the
    eigenvectors, else empty.
    """

    matrix: Tensor
    damping: float
    factor: Tensor
    pivots: Tensor
    eigenvalues: Tensor

    @property
    def positive_definite(self) -> bool:
        """Whether A + λI has only positive eigenvalues."""
        if self.pivots.numel():
            return False
        return not self.eigenvalues.numel() or float(self.eigenvalues[0]) + self.damping > self.noise

    @property
    def noise(self) -> float:
        """Eigenvalues within ± this are zero to rounding: p·eps·‖A + λI‖; 0 where they are not known."""
        if not self.eigenvalues.numel():
            return 0.0
        return _rounding(self.matrix) * float((self.eigenvalues[[0, -1]] + self.damping).abs().amax())

    @functools.cached_property
    def norm(self) -> float:
        """‖A + λI‖, or a bound of it where the eigenvalues are not known: the largest row sum of |A|, plus λ."""
        if self.eigenvalues.numel():
            return float((self.eigenvalues[[0, -1]] + self.damping).abs().amax())
        return float(torch.linalg.matrix_norm(self.matrix, torch.inf)) + self.damping

    @functools.cached_property
    def smallest_eigenvalue(self) -> float:
        """Of A: exact with eigenvalues; by inverse iteration on a Cholesky factor, from below; else by Lanczos.

        That of an indefinite A + λI is a Ritz value less its residual, about ENDS·‖A‖, and −λ at most.
        """
        if self.eigenvalues.numel():
            return float(self.eigenvalues[0])
        if self.pivots.numel():
            ends = extreme_eigenvalues(MatrixOperator(self.matrix), rtol=ENDS, max_passes=MOST_PRODUCTS)
            return min(-self.damping, ends.lower)
        return 1.0 / sum(_largest_of_inverse(self.times_inverse, self.matrix, 1e-4)) - self.damping

    def times_inverse(self, columns: Tensor) -> Tensor:
        """Compute (A + λI)⁻¹ columns, [p, k], from a Cholesky or LU factorisation."""
        if self.pivots.numel():
            found: Tensor = torch.linalg.lu_solve(self.factor, self.pivots, columns)
            return found
        # `torch.cholesky_solve` would copy the factor first
        found = torch.linalg.solve_triangular(self.factor, columns, upper=False)
        found = torch.linalg.solve_triangular(self.factor.T, found, upper=True)
        return found

    @property
    def details(self) -> Mapping[str, Tensor]:
        """The eigenvalues, where they are known."""
        return {"eigenvalues": self.eigenvalues.cpu()} if self.eigenvalues.numel() else {}


@dataclass(frozen=True)
class Direct(Solver[Factorisation]):
    """Dense factorisation: exact to rounding.

    Args:
        damping: λ ≥ 0.
        rtol: The residual norm relative to ‖rhs‖ above which a row counts as not solved. A backward stable solve leaves
            about eps·cond(A + λI), so 1e-6 is missed only beyond cond ≈ 1e10, where few digits of x are right. Rows in
            float32 may miss it by the rounding of x itself, up to 1e-2.
        eigen: Whether to factorise by eigenvalues in any case, for many dampings or to look at the spectrum.

    Raises:
        SettingError: If a hyperparameter is out of range.

    References:
        Golub & Van Loan (2013), Matrix Computations, sections 4.2 and 8.3.
    """

    damping: float
    rtol: float = 1e-6
    eigen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        check_tolerance("rtol", self.rtol)

    @property
    @override
    def solves_over_data(self) -> bool:
        return False

    @override
    def demand(self, systems: Systems) -> Demand:
        # matrix and factor of each block, and of the largest one what eigenvalues take, in float64
        largest = max(systems.sizes) ** 2
        state = DENSE_BYTES * sum(size * size for size in systems.sizes)
        factorising = (EIGEN_FLOPS if self.eigen else 1 / 3) * sum(float(size) ** 3 for size in systems.sizes)
        making = sum((block.dense for block in systems.blocks), PlannedWork(flops=factorising))
        return Demand(
            state + EIGEN_BYTES * largest,
            state,
            row_vectors=10.0,
            fit=making,
            solve=SolveWork(0, 0, row_flops=4.0 * sum(float(size) ** 2 for size in systems.sizes)),
            by_method=True,
            sum_bytes=systems.itemsize * largest,
        )

    @override
    def fit(self, operator: CurvatureOperator) -> Factorisation:
        # Make the matrix and factorise it. Raises NonFiniteError if it has NaN or infinity.
        matrix = operator.dense()
        bad = int((~matrix.isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"`operator` must be finite, got NaN or infinity in {bad} of {matrix.numel()} entries. "
                "Look at the loss and at its second derivatives."
            )
        return self._factorised(operator, matrix)

    def _factorised(self, operator: CurvatureOperator, matrix: Tensor) -> Factorisation:
        if not self.eigen:
            with _shifted(matrix, self.damping):
                factor, failed = torch.linalg.cholesky_ex(matrix)
                largest = matrix.diagonal().max()
            # whether Cholesky fails on a singular matrix is up to rounding: a pivot within it counts as failed
            pivots = factor.diagonal() ** 2
            none = matrix.new_empty(0)
            if not int(failed) and bool(pivots.min() > 10 * _rounding(matrix) * largest):
                return Factorisation(operator, matrix, self.damping, factor, none.int(), none)
            del factor
            with _shifted(matrix, self.damping):
                factor, places, failed = torch.linalg.lu_factor_ex(matrix)
            state = Factorisation(operator, matrix, self.damping, factor, places, none)
            if not int(failed) and _is_regular(state):
                return state
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        return Factorisation(operator, matrix, self.damping, vectors, matrix.new_empty(0).int(), eigenvalues)

    @override
    def adapt(self, state: Factorisation) -> Factorisation:
        # Nothing to do with eigenvalues; else a new factorisation. No products.
        if state.damping == self.damping:
            return state
        if state.eigenvalues.numel():
            return replace(state, damping=self.damping)
        return self._factorised(state.operator, state.matrix)

    @override
    def solve_at(self, state: Factorisation, rhs: Tensor, dampings: Sequence[float]) -> list[Solution]:
        if len(dampings) >= EIGEN_PAYS and not state.eigenvalues.numel():
            state = replace(self, eigen=True)._factorised(state.operator, state.matrix)
        return super().solve_at(state, rhs, dampings)

    @override
    def solve(self, state: Factorisation, rhs: Tensor) -> Solution:
        # Two triangular solves, or the eigenvectors; the residual from the dense matrix.
        check_rhs(rhs, state.operator)
        b = rhs.double()
        x = _eigen_solve(state, b) if state.eigenvalues.numel() else state.times_inverse(b.T).T.contiguous()
        x = x.to(rhs.dtype)
        norms = row_norms(b)
        wide = x.double()
        residual = row_norms(b - torch.add(wide @ state.matrix, wide, alpha=state.damping))
        relative = torch.where(norms > 0, residual / norms, residual).cpu()
        solved = (residual <= self.rtol * norms + _excused(state, x, norms)).cpu()
        known = state.eigenvalues.numel() > 0 or not state.positive_definite
        smallest = state.smallest_eigenvalue + state.damping if known else float("nan")
        k = rhs.shape[0]
        return Solution(
            x=x,
            relative_residual=relative,
            iterations=torch.zeros(k, dtype=torch.int64),
            outcome=tuple(Outcome.CONVERGED if ok else Outcome.SINGULAR for ok in solved.tolist()),
            curvature=torch.full((k,), smallest, dtype=torch.float64),
            largest=state.norm,
        )

    @override
    def state_arrays(self, state: Factorisation) -> dict[str, Tensor]:
        return {
            "matrix": state.matrix,
            "factor": state.factor,
            "pivots": state.pivots,
            "eigenvalues": state.eigenvalues,
        }

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> Factorisation:
        names = ("factor", "pivots", "eigenvalues")
        return Factorisation(operator, arrays["matrix"], self.damping, *(arrays[name] for name in names))


@contextmanager
def _shifted(matrix: Tensor, damping: float) -> Iterator[None]:
    """Put A + λI in the place of A, which comes back to the bit: subtracting would leave rounding behind."""
    diagonal = matrix.diagonal().clone()
    matrix.diagonal().add_(damping)
    try:
        yield
    finally:
        matrix.diagonal().copy_(diagonal)


def _eigen_solve(state: Factorisation, b: Tensor) -> Tensor:
    """Compute the minimum-norm solution: eigenvalues that are zero to rounding have no inverse."""
    values = state.eigenvalues + state.damping
    zero = values.abs() <= state.noise
    inverse = torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, values))
    return (b @ state.factor * inverse) @ state.factor.T


def _excused(state: Factorisation, x: Tensor, norms: Tensor) -> Tensor:
    """Bound the residual [k] from rounding x to a dtype below float64: eps·‖A‖·‖x‖, up to a percent of ‖rhs‖ [k]."""
    if x.dtype == torch.float64:  # as the factorisation: nothing was rounded away
        return torch.zeros_like(norms)
    rounding = torch.finfo(x.dtype).eps * state.norm * row_norms(x)
    return torch.minimum(rounding, 1e-2 * norms)


def _rounding(matrix: Tensor) -> float:
    """p·eps: what rounding does to the eigenvalues of a matrix [p, p], relative to its norm."""
    return matrix.shape[0] * torch.finfo(matrix.dtype).eps


def _is_regular(state: Factorisation) -> bool:
    """Whether no eigenvalue of A + λI is zero to rounding, by inverse iteration on its LU factorisation."""
    largest, residual = _largest_of_inverse(state.times_inverse, state.matrix, 0.1)
    return (largest + residual) * 10 * _rounding(state.matrix) * state.norm < 1  # false for infinity


def _largest_of_inverse(
    inverse: Callable[[Tensor], Tensor], matrix: Tensor, accuracy: float, steps: int = 30
) -> tuple[float, float]:
    """Find the largest |eigenvalue| of an inverse [p, p] and its residual, by subspace iteration with 8 seeded vectors.

    matrix: of that size, on its device. The Rayleigh quotient is at most the largest eigenvalue; the sum of both is an
    upper bound up to the directions that the seeds do not see. accuracy: of the residual, relative to the eigenvalue.
    """
    p = matrix.shape[0]
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(p, min(8, p), generator=generator, dtype=torch.float64).to(matrix.device)
    largest = residual = 0.0
    for _ in range(steps):
        q, _ = torch.linalg.qr(block)
        block = inverse(q)
        if not block.isfinite().all():
            return float("inf"), 0.0
        values, vectors = torch.linalg.eigh(q.T @ block)
        at = int(values.abs().argmax())
        largest = abs(float(values[at]))
        residual = float((block @ vectors[:, at] - values[at] * (q @ vectors[:, at])).norm())
        if residual <= accuracy * largest:
            break
    return largest, residual
