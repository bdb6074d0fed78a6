"""Jacobi preconditioner: the inverse of the diagonal of A + λI, with the diagonal estimated by random probes.

Cost: one pass with all probes. Memory: one row. Reference: Bekas, Kokiopoulou & Saad (2007), "An estimator for the
diagonal of a matrix", Applied Numerical Mathematics 57, after Hutchinson (1990).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.solvers.base import check_count, hold_plain
from distinfluence.solvers.spectrum import rademacher

FLOOR = 1e-3  # of the mean of |diagonal|: what an estimate below it is lifted to


@dataclass(frozen=True)
class Diagonal:
    """M = diag(A) + λI, positive. diagonal: [p], clamped. clamped: how many entries of the estimate were lifted."""

    diagonal: Tensor
    damping: float
    clamped: int

    def apply(self, rows: Tensor) -> Tensor:
        """rows [k, p] / (diagonal + λ)."""
        return rows / (self.diagonal + self.damping)

    def at(self, damping: float) -> "Diagonal":
        """Return the same diagonal with another λ; no products."""
        return Diagonal(self.diagonal, damping, self.clamped)

    @property
    def remarks(self) -> tuple[str, ...]:
        """How much of the estimate could not be used."""
        if not self.clamped:
            return ()
        return (
            f"Jacobi preconditioner: {self.clamped} of {self.diagonal.numel()} entries of the estimated diagonal were "
            "not positive and were lifted. More probes, or the Gauss–Newton matrix, would help.",
        )


@dataclass(frozen=True)
class JacobiPreConditioner:
    """The diagonal of A by Hutchinson's estimate.

    It helps where the diagonal is badly scaled, which is rare for networks: measure.

    Args:
        num_samples_estimator: The number of Rademacher probes; ten or more, since the estimate of an entry has the
            variance of the row's other entries over their number, and negative estimates have to be clamped.
        seed: The seed of the probes.

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> from distinfluence.curvature import MatrixOperator
    >>> operator = MatrixOperator(torch.diag(torch.tensor([1.0, 3.0])))  # a diagonal matrix is seen by any probe
    >>> JacobiPreConditioner().fit(operator, damping=1.0).apply(torch.tensor([[2.0, 4.0]]))
    tensor([[1., 1.]])
    """

    num_samples_estimator: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        hold_plain(self)
        check_count("num_samples_estimator", self.num_samples_estimator)

    def fit(self, operator: CurvatureOperator, damping: float) -> Diagonal:
        """Estimate the diagonal; one pass with all probes.

        Args:
            operator: The curvature A.
            damping: λ ≥ 0.

        Returns:
            M⁻¹.
        """
        probes = rademacher(operator, self.num_samples_estimator, self.seed)
        estimate = (probes * operator.matmat(probes)).mean(dim=0)
        floor = FLOOR * float(estimate.abs().mean()) or float(torch.finfo(estimate.dtype).tiny)
        low = estimate < floor
        return Diagonal(torch.where(low, floor, estimate), damping, int(low.sum()))

    def demand(self, size: int) -> tuple[int, int]:
        """Return the work of a fit: one pass.

        Args:
            size: p.

        Returns:
            Passes over the data, and rows that all of them multiply together.
        """
        return 1, self.num_samples_estimator

    def arrays(self, fitted: Diagonal) -> dict[str, Tensor]:
        """Return what must be kept of a fit.

        Args:
            fitted: What `fit` returned.

        Returns:
            Name → tensor.
        """
        return {"diagonal": fitted.diagonal, "clamped": torch.tensor(fitted.clamped)}

    def restore(self, operator: CurvatureOperator, damping: float, arrays: Mapping[str, Tensor]) -> Diagonal:
        """Return what `fit` returned, from its arrays, without products.

        Args:
            operator: An operator equal to the fitted one.
            damping: λ ≥ 0.
            arrays: What `arrays` returned.

        Returns:
            M⁻¹.
        """
        return Diagonal(arrays["diagonal"], damping, int(arrays["clamped"]))
