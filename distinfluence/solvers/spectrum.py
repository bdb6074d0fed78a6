"""What can be had of the spectrum without the matrix: its ends by Lanczos, its mean by random probes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.solvers.lanczos import BlockLanczos

BLOCK = 4  # start vectors: an end that one of them misses is seen by another, and a pass is the same


@dataclass(frozen=True)
class Extremes:
    """The ends of the spectrum of A as far as Lanczos saw them.

    That no eigenvalue lies beyond is overwhelmingly likely for random start vectors, not certain: bounds that rest on
    it are called heuristic.

    Args:
        smallest: The smallest Ritz value, which lies inside of the spectrum.
        largest: The largest Ritz value, likewise.
        smallest_residual: A has an eigenvalue within this distance of the smallest Ritz value.
        largest_residual: A has an eigenvalue within this distance of the largest Ritz value.
        smallest_positive: The smallest Ritz value above rounding; 0 if there is none.
        passes: The passes over the data.
    """

    smallest: float
    largest: float
    smallest_residual: float
    largest_residual: float
    smallest_positive: float
    passes: int

    @property
    def lower(self) -> float:
        """The smallest Ritz value less its residual."""
        return self.smallest - self.smallest_residual

    @property
    def upper(self) -> float:
        """The largest Ritz value and its residual."""
        return self.largest + self.largest_residual

    @property
    def norm(self) -> float:
        """An upper estimate of ‖A‖."""
        return max(abs(self.lower), abs(self.upper))


def extreme_eigenvalues(
    operator: CurvatureOperator, *, rtol: float = 1e-2, max_passes: int = 40, seed: int = 0
) -> Extremes:
    """Find both ends of the spectrum by Lanczos. Seeded: the same for the same operator.

    Args:
        operator: The curvature A.
        rtol: The residuals, relative to ‖A‖, at which the search ends.
        max_passes: The largest number of passes of 4 rows; 5 to 20 are usual.
        seed: The seed of the start vectors.

    Returns:
        The ends of the spectrum.
    """
    lanczos = BlockLanczos(operator, random_rows(operator, BLOCK, seed))
    passes = 0
    found = Extremes(0.0, 0.0, 0.0, 0.0, 0.0, 0)
    while passes < max_passes and not lanczos.exhausted:
        lanczos.step()
        passes += 1
        if not lanczos.projected.isfinite().all():
            return Extremes(-math.inf, math.inf, 0.0, 0.0, 0.0, passes)
        values, _, residuals = lanczos.ritz()
        noise = 10 * math.sqrt(operator.size) * float(torch.finfo(operator.dtype).eps) * lanczos.largest
        positive = values[values > noise]
        found = Extremes(
            smallest=float(values[0]),
            largest=float(values[-1]),
            smallest_residual=float(residuals[0]),
            largest_residual=float(residuals[-1]),
            smallest_positive=float(positive[0]) if positive.numel() else 0.0,
            passes=passes,
        )
        if max(found.smallest_residual, found.largest_residual) <= rtol * found.norm:
            break
    return found


def mean_eigenvalue(operator: CurvatureOperator, *, n_probes: int = 32, seed: int = 0) -> float:
    """Estimate trace(A) / p by Hutchinson's method with Rademacher probes; one pass.

    The standard deviation is √(2/n_probes)·‖A‖_F / p, about a quarter of that of Gaussian probes where A is diagonally
    dominant.

    Args:
        operator: The curvature A.
        n_probes: The number of probes.
        seed: The seed of the probes.

    Returns:
        The mean eigenvalue.

    References:
        Hutchinson (1990), Communications in Statistics 19.
    """
    probes = rademacher(operator, n_probes, seed)
    return float((probes * operator.matmat(probes)).sum(dtype=torch.float64)) / (n_probes * operator.size)


def random_rows(operator: CurvatureOperator, k: int, seed: int) -> Tensor:
    """k Gaussian rows [k, p] in the operator's dtype; drawn on the CPU, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, operator.size, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)


def rademacher(operator: CurvatureOperator, k: int, seed: int) -> Tensor:
    """k rows of random signs [k, p] in the operator's dtype; drawn on the CPU, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (k, operator.size), generator=generator)
    return (2 * signs - 1).to(operator.device, operator.dtype)
