"""What a preconditioner is: an approximate inverse of A + λI, fitted once for a λ, applied in every iteration."""

from typing import Protocol

from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator


class FittedPreconditioner(Protocol):
    """M⁻¹ of one operator and one damping; must be symmetric and positive definite."""

    def apply(self, rows: Tensor) -> Tensor:
        """rows [k, p] → rows · M⁻¹ [k, p], in the same dtype."""


class Preconditioner(Protocol):
    """How to make M⁻¹ ≈ (A + λI)⁻¹. Stopping criteria refer to the true residual, never to the preconditioned one."""

    def fit(self, operator: CurvatureOperator, damping: float) -> FittedPreconditioner:
        """All work that needs no right-hand side."""
