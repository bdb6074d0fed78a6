"""Block conjugate gradients that cannot break down: one search space for all rows, one pass for each step.

The search directions are made orthonormal anew in every step by a factorisation that reveals their rank, so duplicate,
dependent and zero rows, rows that converge early, and more rows than parameters are all harmless. All rows profit from
all directions: far fewer passes than rows on their own. Reference: Ji & Li (2017), "A breakdown-free block conjugate
gradient method", BIT 57, Algorithm 2.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.solvers.base import row_norms
from distinfluence.solvers.conjugate import CgState, ConjugateSolver, DriftWatch
from distinfluence.solvers.demand import SolveWork
from distinfluence.solvers.iterative import Steps

STEP_FLOPS = 20.0  # for each pair of rows and parameter in a step: directions made orthonormal, and updates


@dataclass(frozen=True)
class BlockCG(ConjugateSolver):
    """Breakdown-free block conjugate gradients.

    Negative curvature anywhere in the search space stops all rows that are not done.

    Args:
        damping: λ ≥ 0.
        rtol: Relative tolerance. A row has converged when ‖rhs − (A + λI) x‖ ≤ max(rtol·‖rhs‖, atol), as in SciPy, for
            the true residual. None is 1e-7 in float64 and 1e-4 in float32.
        atol: Absolute tolerance.
        maxiter: The largest number of iterations of a row; 10·p up to 5000 if None.
        preconditioner: See `Preconditioner`; none if None.

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> from distinfluence.curvature import MatrixOperator
    >>> solver = BlockCG(damping=1.0)
    >>> state = solver.fit(MatrixOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))))
    >>> solver.solve(state, torch.tensor([[2.0, 4.0], [2.0, 4.0]], dtype=torch.float64)).iterations
    tensor([2, 2])
    """

    @override
    def _row_vectors(self) -> float:
        return 12.0

    @override
    def _solving(self, steps: int, rank: int, size: int) -> SolveWork:
        work = super()._solving(steps, rank, size)
        return replace(work, block=True, step_flops=STEP_FLOPS * size)

    def _inner(self, state: CgState, rhs: Tensor, threshold: Tensor, budget: Tensor) -> Steps:
        result = Steps.none(rhs)
        rows = torch.arange(rhs.shape[0], device=rhs.device)
        mix, r = independent_rows(rhs)
        p = orthonormal_rows(state.precondition(r))
        watch = DriftWatch(state, rhs)
        for _ in range(int(budget.max())):
            q = state.matmat(p)
            gram = p @ q.T
            if not gram.isfinite().all():  # LAPACK would raise; a row that does not end well is no error
                break
            projected = _Projected(gram, result.largest, result.rounding)
            result.largest = projected.largest
            result.curvature[rows] = result.curvature[rows].clamp_max(projected.smallest)
            result.steps[rows] += 1
            inverse = projected.inverse()
            if inverse is None:
                result.flat[rows] = True
                break
            step = (inverse @ (p @ r.T).double()).to(rhs.dtype)
            result.d[rows] += (mix @ step.T) @ p
            r -= step.T @ q
            residual = mix @ r
            size = row_norms(residual)
            ratio = size / threshold[rows]
            active = (ratio > 1) & (size > result.attainable(rows)) & (result.steps[rows] < budget[rows])
            keep = watch.sound(active, rows, result, residual, ratio)
            if not keep.any():
                break
            rows, mix = rows[keep], mix[keep]
            used = (mix != 0).any(dim=0)
            mix, r = mix[:, used], r[used]
            z = state.precondition(r)
            conjugate = -(inverse @ (q @ z.T).double()).to(rhs.dtype)
            p = (conjugate.T @ p).add_(z)
            del q, z  # orthonormal_rows needs their memory
            p = orthonormal_rows(p)
            if p.shape[0] == 0:
                break
        return result


def independent_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [k, p] = mix [k, r] · basis [r, p]: the rows themselves if they are independent, else a basis of their span.

    Without this, dependent residuals would drift apart by rounding, and once that has grown to the size of what is left
    of them, it spoils the search space: six times the passes for rows that come twice.
    """
    k = rows.shape[0]
    basis = orthonormal_rows(rows)
    if basis.shape[0] == k:
        return torch.eye(k, dtype=rows.dtype, device=rows.device), rows.clone()
    return rows @ basis.T, basis


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Compute an orthonormal basis [r, p] of the rows' span [k, p], r ≤ min(k, p) their numerical rank.

    Rows are scaled to norm 1 first, so that a row that has nearly converged counts as much as one that has not;
    directions with a singular value below 10·√p·eps of the largest are rounding and are dropped.
    """
    length = row_norms(rows)
    scaled = rows[length > 0].div_(length[length > 0].to(rows.dtype)[:, None])
    if scaled.shape[0] == 0:
        return scaled
    q, r = torch.linalg.qr(scaled.T)
    u, sigma, _ = torch.linalg.svd(r.double(), full_matrices=False)
    tolerance = 10 * rows.shape[1] ** 0.5 * torch.finfo(rows.dtype).eps
    kept = u[:, sigma > tolerance * sigma[0]].to(rows.dtype)
    basis: Tensor = (q @ kept).T.contiguous()
    return basis


class _Projected:
    """T = Pᵀ(A + λI)P [r, r] in float64, for orthonormal P; its diagonal and eigenvalues are Rayleigh quotients.

    smallest: the least of those seen, the least eigenvalue where T is not positive definite. largest: the largest in
    absolute value, of those seen before as well; quotients below `rounding` of that are flat.
    """

    def __init__(self, gram: Tensor, largest: float, rounding: float) -> None:
        small = gram.double()
        self._matrix = (small + small.T) / 2
        self._vectors = self._values = self._matrix.diagonal()
        self._factor, failed = torch.linalg.cholesky_ex(self._matrix)
        self.largest = max(largest, float(self._values.abs().max()))
        # where T is singular, whether Cholesky fails is up to rounding: a pivot within the noise counts as failed
        pivot = float(self._factor.diagonal().min()) ** 2
        self._definite = not int(failed) and pivot > rounding * self.largest
        if not self._definite:
            self._values, self._vectors = torch.linalg.eigh(self._matrix)
            self.largest = max(self.largest, float(self._values.abs().max()))
        self.smallest = float(self._values.min())
        self._noise = rounding * self.largest

    def inverse(self) -> Tensor | None:
        """T⁻¹; without the directions that are flat to rounding, and None where T is indefinite or wholly flat.

        A singular matrix without damping has flat directions: the others still make progress.
        """
        if self._definite:
            return torch.cholesky_inverse(self._factor)
        steep = self._values > self._noise
        if self.smallest < -self._noise or not steep.any():
            return None
        return (self._vectors[:, steep] / self._values[steep]) @ self._vectors[:, steep].T
