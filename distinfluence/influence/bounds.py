"""Certificates: how far influences can be from the exact ones, as two vectors.

If A + λI ⪰ μI, then |Î_ij − I_ij| ≤ ‖r_i‖·‖g_j‖ / μ for every entry, with r_i the residual of test point i's factor and
g_j the gradient of training point j. Rigorous with μ = λ where A is positive semi-definite by what it is (empirical
Fisher; Gauss–Newton of a convex loss); heuristic where the smallest eigenvalue of A comes from Lanczos.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator
from distinfluence.solvers.base import Solution, SolverState, row_norms
from distinfluence.solvers.spectrum import Extremes

ROUNDING = 16  # times eps·‖A + λI‖·‖x‖ is what a fresh product may be off by, times eps·‖x‖·‖g‖ an influence


@dataclass(frozen=True)
class LowerBound:
    """value: μ > 0 with A + λI ⪰ μI. rigorous: whether for certain."""

    value: float
    rigorous: bool


def lower_bound(
    operator: CurvatureOperator, state: SolverState, damping: float, extremes: Extremes | None
) -> LowerBound | None:
    """μ of a block, None where there is no positive one or nothing is known of the spectrum."""
    if operator.positive_semidefinite:
        return LowerBound(damping, True) if damping > 0 else None
    smallest = extremes.lower if extremes is not None else state.smallest_eigenvalue
    if smallest is None or not math.isfinite(smallest) or smallest + damping <= 0:
        return None
    return LowerBound(smallest + damping, False)


def error_bounds(
    solutions: Mapping[str, Solution], rhs: Mapping[str, Tensor], bounds: Mapping[str, LowerBound | None]
) -> Tensor | None:
    """[k] float64, c_i with |Î_ij − I_ij| ≤ c_i·‖g_j‖; None unless every block has a lower bound.

    Over blocks, Σ_b ε_ib·‖g_jb‖/μ_b ≤ √(Σ_b (ε_ib/μ_b)²)·‖g_j‖ (Cauchy and Schwarz). Includes the rounding of the
    products with g_j in the dtype of rhs.
    """
    squared, sizes = [], []
    for block, solution in solutions.items():
        bound = bounds[block]
        if bound is None:
            return None
        squared.append((_residual_norms(solution, rhs[block]) / bound.value) ** 2)
        sizes.append(row_norms(solution.x).cpu() ** 2)
    eps = float(torch.finfo(next(iter(rhs.values())).dtype).eps)
    return torch.stack(squared).sum(dim=0).sqrt() + ROUNDING * eps * torch.stack(sizes).sum(dim=0).sqrt()


def _residual_norms(solution: Solution, rhs: Tensor) -> Tensor:
    """‖r_i‖ with room for the rounding of the product that it was measured by, [k] float64."""
    size = row_norms(rhs).cpu()
    residual = torch.where(size > 0, solution.relative_residual * size, solution.relative_residual)
    largest = 0.0 if math.isnan(solution.largest) else solution.largest
    eps = float(torch.finfo(solution.x.dtype).eps)
    return residual + ROUNDING * eps * (largest * row_norms(solution.x).cpu() + size)
