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
        """Apply M⁻¹.

        Args:
            rows: The rows, [k, p].

        Returns:
            rows · M⁻¹, [k, p], in the same dtype.
        """


class Preconditioner(Protocol):
    """How to make M⁻¹ ≈ (A + λI)⁻¹. Stopping criteria refer to the true residual, never to the preconditioned one."""

    def fit(self, operator: CurvatureOperator, damping: float) -> FittedPreconditioner:
        """Do all work that needs no right-hand side.

        Args:
            operator: The curvature A.
            damping: λ ≥ 0.

        Returns:
            M⁻¹.
        """


@runtime_checkable
class SupportsDamping(Protocol):
    """A fitted preconditioner that serves another damping without a new fit."""

    def at(self, damping: float) -> FittedPreconditioner:
        """Return M⁻¹ for another damping.

        Args:
            damping: λ ≥ 0.

        Returns:
            M⁻¹ for A + λI.
        """


@runtime_checkable
class SupportsDemand(Protocol):
    """A preconditioner that knows the work of its fit beforehand."""

    def demand(self, size: int) -> tuple[int, int]:
        """Return the work of a fit.

        Args:
            size: p.

        Returns:
            Passes over the data, and rows that all of them multiply together.
        """


@runtime_checkable
class SupportsStorage(Protocol):
    """A preconditioner whose fit can be stored: else every process that restores a model fits it again."""

    def arrays(self, fitted: Any) -> dict[str, Tensor]:
        """Return what must be kept of a fit.

        Args:
            fitted: What `fit` returned.

        Returns:
            Name → tensor.
        """

    def restore(
        self, operator: CurvatureOperator, damping: float, arrays: Mapping[str, Tensor]
    ) -> FittedPreconditioner:
        """Return what `fit` returned, from its arrays, without products.

        Args:
            operator: An operator equal to the fitted one.
            damping: λ ≥ 0.
            arrays: What `arrays` returned.

        Returns:
            M⁻¹.
        """
