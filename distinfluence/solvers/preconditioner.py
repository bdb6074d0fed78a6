"""What a preconditioner is: an approximate inverse of A + λI, fitted once for a λ, applied in every iteration."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator


class FittedPreconditioner(Protocol):
    """M⁻¹ of one operator and one damping; must be symmetric and positive definite.

    A `remarks` attribute, a tuple of sentences, goes into the fit report.
    """

    def apply(self, rows: Tensor) -> Tensor:
        """rows [k, p] → rows · M⁻¹ [k, p], in the same dtype."""


class Preconditioner(Protocol):
    """How to make M⁻¹ ≈ (A + λI)⁻¹. Stopping criteria refer to the true residual, never to the preconditioned one."""

    def fit(self, operator: CurvatureOperator, damping: float) -> FittedPreconditioner:
        """All work that needs no right-hand side."""


@runtime_checkable
class SupportsDamping(Protocol):
    """A fitted preconditioner that serves another damping without a new fit."""

    def at(self, damping: float) -> FittedPreconditioner:
        """M⁻¹ for A + damping·I."""


@runtime_checkable
class SupportsStorage(Protocol):
    """A preconditioner whose fit can be stored: else every process that restores a model fits it again."""

    def arrays(self, fitted: Any) -> dict[str, Tensor]:
        """What must be kept of what `fit` returned."""

    def restore(
        self, operator: CurvatureOperator, damping: float, arrays: Mapping[str, Tensor]
    ) -> FittedPreconditioner:
        """What `fit` returned, again from its arrays."""
