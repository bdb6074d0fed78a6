"""Randomised Nyström preconditioner: the inverse of a low-rank sketch on its range, the identity beyond.

    M⁻¹ = (λ_r + λ) Uᵀ (Λ + λI)⁻¹ U + (I − Uᵀ U),  with λ_r the smallest kept eigenvalue

Positive definite always. With a rank of a few times the effective dimension tr(A (A + λI)⁻¹), the preconditioned
condition number is bounded by a constant. Cost: one pass with `rank` rows (two for an operator that is not known to be
positive semi-definite). Memory: rank·p numbers. Reference: Frangella, Tropp & Udell (2023), "Randomized Nyström
preconditioning", SIAM J. Matrix Anal. Appl. 44, equation 1.3, Theorem 2.2 and Algorithm E.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator, SupportsGaussNewton
from distinfluence.solvers.base import check_count, hold_plain
from distinfluence.solvers.nystroem import (
    ESTIMATE_PASSES,
    PROBES,
    LowRank,
    approximation_error,
    extend,
    low_rank,
    sketched,
)

ENOUGH = 10.0  # times λ is an error ‖A − Â‖ that an adaptive rank is content with: condition numbers of about 10


@dataclass(frozen=True)
class NystroemInverse:
    """M⁻¹ of a sketch at a damping. error: an estimate of ‖A − Â‖ from below, NaN where none was made."""

    sketch: LowRank
    damping: float
    error: float
    of_gauss_newton: bool

    def apply(self, rows: Tensor) -> Tensor:
        """rows [k, p] · M⁻¹; 4·r·p flops a row."""
        basis, values = self.sketch.basis, self.sketch.values
        if not values.numel() or not float(values[0]) > 0:
            return rows
        positive = values > 0
        kept = values[positive] + self.damping
        scale = torch.zeros_like(values)
        scale[positive] = kept[-1] / kept - 1.0
        inside = (rows @ basis.T) * scale.to(rows.dtype)
        return rows + inside @ basis

    def at(self, damping: float) -> "NystroemInverse":
        """Return the same sketch at another λ; no products."""
        return NystroemInverse(self.sketch, damping, self.error, self.of_gauss_newton)

    @property
    def rank(self) -> int:
        """Rows of the sketch."""
        return self.sketch.values.numel()

    @property
    def effective_dimension(self) -> float:
        """Σ Λ / (Λ + λ) of the sketch: twice or three times this is a good rank."""
        values = self.sketch.values
        return float((values / (values + self.damping)).nan_to_num().sum())

    @property
    def remarks(self) -> tuple[str, ...]:
        """What it was made of, and how good it is."""
        of = " of the Gauss–Newton matrix" if self.of_gauss_newton else ""
        said = [
            f"Nyström preconditioner{of}: rank {self.rank}, effective dimension {self.effective_dimension:.0f}"
            + ("" if self.error != self.error else f", ‖A − Â‖ about {self.error:.2g}")
        ]
        if self.sketch.clipped < 0:
            said.append(
                f"Nyström preconditioner: A is indefinite, and its negative part (down to {self.sketch.clipped:.2g}) "
                "is left out."
            )
        return tuple(said)


@dataclass(frozen=True)
class NystroemPreConditioner:
    """A Nyström sketch of A as a preconditioner.

    A Hessian, which may be indefinite, is preconditioned by its Gauss–Newton matrix. Another operator that is not known
    to be positive semi-definite is preconditioned by its own positive part.

    Args:
        rank: The rows of the sketch; where adaptive, of the first try.
        seed: The seed of the sketch.
        adaptive: Whether to double the rank, re-using what is there, until ‖A − Â‖ ≤ 10·λ by a power estimate (5 passes
            of 4 rows each time) or `max_rank`.
        max_rank: The largest rank where adaptive.

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> from distinfluence.curvature import MatrixOperator
    >>> operator = MatrixOperator(torch.diag(torch.tensor([9.0, 4.0, 0.0], dtype=torch.float64)))
    >>> inverse = NystroemPreConditioner(rank=2).fit(operator, damping=1.0)
    >>> inverse.rank
    2
    """

    rank: int = 60
    seed: int = 0
    adaptive: bool = False
    max_rank: int = 1000

    def __post_init__(self) -> None:
        hold_plain(self)
        check_count("rank", self.rank)
        check_count("max_rank", self.max_rank, self.rank if self.adaptive else 1)

    def fit(self, operator: CurvatureOperator, damping: float) -> NystroemInverse:
        """Sketch the operator, or its Gauss–Newton relative.

        Args:
            operator: The curvature A.
            damping: λ ≥ 0.

        Returns:
            M⁻¹.
        """
        relative = not operator.positive_semidefinite and isinstance(operator, SupportsGaussNewton)
        target = operator.gauss_newton() if isinstance(operator, SupportsGaussNewton) and relative else operator
        sketch = sketched(target, self.rank, seed=self.seed)
        found, error = low_rank(target, sketch), float("nan")
        while self.adaptive:
            error = approximation_error(target, found)
            rank = min(2 * sketch.omega.shape[0], self.max_rank, operator.size)
            if error <= ENOUGH * damping or rank <= sketch.omega.shape[0]:
                break
            sketch = extend(target, sketch, rank)
            found = low_rank(target, sketch)
        return NystroemInverse(found, damping, error, relative)

    def demand(self, size: int) -> tuple[int, int]:
        """Return the work of a fit: one pass, for a matrix that is positive semi-definite; adaptive, the first try.

        Args:
            size: p.

        Returns:
            Passes over the data, and rows that all of them multiply together.
        """
        estimate = (ESTIMATE_PASSES, ESTIMATE_PASSES * min(PROBES, size)) if self.adaptive else (0, 0)
        return 1 + estimate[0], min(self.rank, size) + estimate[1]

    def arrays(self, fitted: NystroemInverse) -> dict[str, Tensor]:
        """Return what must be kept of a fit.

        Args:
            fitted: What `fit` returned.

        Returns:
            Name → tensor.
        """
        numbers = [fitted.sketch.shift, fitted.sketch.clipped, fitted.error, float(fitted.of_gauss_newton)]
        return {
            "basis": fitted.sketch.basis,
            "values": fitted.sketch.values,
            "numbers": torch.tensor(numbers, dtype=torch.float64),
        }

    def restore(self, operator: CurvatureOperator, damping: float, arrays: Mapping[str, Tensor]) -> NystroemInverse:
        """Return what `fit` returned, from its arrays, without products.

        Args:
            operator: An operator equal to the fitted one.
            damping: λ ≥ 0.
            arrays: What `arrays` returned.

        Returns:
            M⁻¹.
        """
        shift, clipped, error, relative = arrays["numbers"].tolist()
        return NystroemInverse(
            LowRank(arrays["basis"], arrays["values"], shift, clipped), damping, error, bool(relative)
        )
