"""Conjugate gradients, vectorised over rows, each row with its own step lengths and its own end.

One pass for each step, over the rows that are not done. Reference: Hestenes & Stiefel (1952); with a preconditioner,
Golub & Van Loan (2013), Algorithm 11.5.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.solvers.base import row_dots, row_norms
from distinfluence.solvers.conjugate import CgState, ConjugateSolver, DriftWatch
from distinfluence.solvers.iterative import Steps


@dataclass(frozen=True)
class CG(ConjugateSolver):
    """Row-wise conjugate gradients.

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
    >>> solver = CG(damping=1.0)
    >>> state = solver.fit(MatrixOperator(torch.diag(torch.tensor([1.0, 3.0]))))
    >>> solver.solve(state, torch.tensor([[2.0, 4.0]])).x.round(decimals=5)
    tensor([[1., 1.]])
    """

    def _inner(self, state: CgState, rhs: Tensor, threshold: Tensor, budget: Tensor) -> Steps:
        result = Steps.none(rhs)
        rows = torch.arange(rhs.shape[0], device=rhs.device)
        r, z = rhs.clone(), state.precondition(rhs)
        p, rz = z.clone(), row_dots(r, z)
        watch = DriftWatch(state, rhs)
        for _ in range(int(budget.max())):
            q = state.matmat(p)
            curved = row_dots(p, q)
            quotient = curved / row_norms(p) ** 2
            result.curvature[rows] = torch.minimum(result.curvature[rows], quotient)
            result.largest = max(result.largest, float(quotient.abs().max()))
            flat = quotient <= result.noise
            step = torch.where(flat, 0.0, rz / torch.where(flat, 1.0, curved)).to(rhs.dtype)
            result.d[rows] += step[:, None] * p
            r -= step[:, None] * q
            result.flat[rows] = flat
            result.steps[rows] += 1
            size = row_norms(r)
            ratio = size / threshold[rows]
            active = (ratio > 1) & (size > result.attainable(rows)) & ~flat & (result.steps[rows] < budget[rows])
            keep = watch.sound(active, rows, result, r, ratio)
            if not keep.any():
                break
            rows, r, p, rz = rows[keep], r[keep], p[keep], rz[keep]
            z = state.precondition(r)
            rz, before = row_dots(r, z), rz
            p = z + (rz / before).to(rhs.dtype)[:, None] * p
        return result
