"""Certified quadratic forms bᵀ (A + λI)⁻¹ b: brackets that tighten with every step.

Conjugate gradients for row b are Gauss quadrature of 1/t for b's spectral measure: the energy that they gain is a lower
bound in every step. With a lower end μ of the spectrum as a prescribed node (Gauss–Radau) they give an upper bound too.
One pass for each step, all rows together; four rows of memory for each row. References: Golub & Meurant (2010),
Matrices, Moments and Quadrature; Meurant & Tichý (2013), "On computing quadrature-based bounds for the A-norm of the
error in conjugate gradients", Numerical Algorithms 62, for the recurrences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.errors import SettingError
from distinfluence.solvers.base import check_count, check_rhs, check_tolerance, damped


@dataclass(frozen=True)
class Brackets:
    """Bounds with lower ≤ bᵀ (A + λI)⁻¹ b ≤ upper.

    Args:
        lower: The lower bounds, [k] float64.
        upper: The upper bounds, [k] float64.
        iterations: The steps of each row, [k] int64.
    """

    lower: Tensor
    upper: Tensor
    iterations: Tensor


def quadratic_forms(
    operator: CurvatureOperator,
    damping: float,
    rows: Tensor,
    smallest: float,
    *,
    rtol: float = 1e-3,
    maxiter: int = 500,
) -> Brackets:
    """Bracket b (A + λI)⁻¹ bᵀ for each row b.

    The bounds are as rigorous as μ is. They leave room for the rounding of the products, eps·‖A + λI‖/μ of the value.

    Args:
        operator: The curvature A.
        damping: λ ≥ 0.
        rows: The rows b, [k, p].
        smallest: A lower bound μ > 0 of the eigenvalues of A + λI; λ itself where A is positive semi-definite.
        rtol: A row is done when upper − lower ≤ rtol·lower.
        maxiter: The largest number of steps.

    Returns:
        The brackets of each row.

    Raises:
        SettingError: If μ is not above 0.
    """
    if not smallest > 0:
        raise SettingError(f"`smallest` must be > 0, got {smallest!r}. Pass a lower bound of the spectrum of A + λI.")
    check_tolerance("rtol", rtol)
    check_count("maxiter", maxiter)
    check_rhs(rows, operator, "rows")
    run = _Steps(rows, smallest, rtol)
    for _ in range(maxiter):
        if not run.active.numel():
            break
        run.advance(damped(operator, run.directions, damping))
    return run.brackets()


class _Steps:
    """Conjugate gradients for the rows that are not done; scalars in float64."""

    def __init__(self, rows: Tensor, smallest: float, rtol: float) -> None:
        self._mu, self._rtol = smallest, rtol
        self._eps = float(torch.finfo(rows.dtype).eps)
        squared = rows.double().square().sum(dim=1)
        self._lower = torch.zeros_like(squared)
        self._upper = squared / smallest
        self._iterations = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
        self.active = (squared > 0).nonzero().flatten()
        self._r = rows[self.active].clone()
        self.directions = self._r.clone()
        self._rr = squared[self.active]
        self._largest = 0.0
        self._radau = torch.full_like(self._rr, 1.0 / smallest)  # Meurant & Tichý (2013), γ^(μ)

    def advance(self, product: Tensor) -> None:
        """One step: product: [n, p], directions · (A + λI)."""
        curved = torch.linalg.vecdot(self.directions.double(), product.double())
        sound = curved > 0  # rounding or a wrong μ otherwise: such a row stops with the bounds it has
        gamma = torch.where(sound, self._rr / torch.where(sound, curved, 1.0), 0.0)
        quotients = curved / self.directions.double().square().sum(dim=1)
        self._largest = max(self._largest, float(quotients.max()))
        here = self.active
        self._lower[here] += gamma * self._rr
        self._r = self._r - gamma.to(self._r.dtype)[:, None] * product
        after = self._r.double().square().sum(dim=1)
        delta = after / self._rr
        gap = self._radau - gamma
        self._radau = gap / (self._mu * gap + delta)
        upper = self._lower[here] + self._radau * after
        self._upper[here] = torch.where(sound & (upper < self._upper[here]), upper, self._upper[here])
        self._iterations[here] += 1
        width = self._upper[here] - self._lower[here]
        # below the rounding of the products nothing is gained any more
        keep = sound & (width > self._rtol * self._lower[here]) & (after > (self._eps * self._mu) ** 2 * self._rr)
        ratio = delta.to(self._r.dtype)[keep, None]
        self._r = self._r[keep]
        self.directions = self._r + ratio * self.directions[keep]
        self.active, self._rr, self._radau = here[keep], after[keep], self._radau[keep]

    def brackets(self) -> Brackets:
        room = self._eps * self._largest / self._mu
        upper = torch.maximum(self._upper, self._lower)
        return Brackets(self._lower * max(0.0, 1 - room), upper * (1 + room), self._iterations)
