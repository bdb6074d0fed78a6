"""The curvature matrix as a linear operator: what solvers are allowed to know of it.

An operator is a symmetric matrix A [p, p] that is only ever touched through `matmat`, one product with a block of
rows. For an operator over a data set one `matmat` is one pass over the data, whatever the number of rows; `work`
counts both, so that tests can hold a solver to its cost.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distinfluence.errors import DtypeError, ShapeError

IDENTITY_BYTES = 64 * 2**20  # rows of the identity that `dense` sends through one `matmat`


@dataclass
class Work:
    """What an operator has done so far: `passes` calls of `matmat`, with `rows` right-hand sides in all.

    batches: products with the matrix of one mini-batch; they are no passes.
    """

    passes: int = 0
    rows: int = 0
    batches: int = 0


@runtime_checkable
class SupportsBatches(Protocol):
    """An operator that is a mean over mini-batches, for stochastic solvers.

    n_batches: how many. batch_sizes: samples of each. in_any_order: whether `batch_matmat` may be called with the
    indices in any order at no extra cost; else 0, 1, 2, … again and again is what it is made for.
    """

    n_batches: int
    batch_sizes: tuple[int, ...]
    in_any_order: bool

    def batch_matmat(self, index: int, rows: Tensor) -> Tensor:
        """rows [k, p] times the mean matrix of one mini-batch: [k, p]. Counts in `work.batches`, not as a pass."""


@runtime_checkable
class SupportsSampleGradients(Protocol):
    """An operator over samples whose gradients g_j can be had."""

    def inverse_harmonic_mean(self, rows: Tensor, damping: float) -> Tensor:
        """rows [k, p] · (1/N) Σ_j (g_j g_jᵀ + λI)⁻¹, each inverse by Sherman–Morrison; one pass."""

    def mean_square_gradient(self) -> float:
        """(1/N) Σ_j ‖g_j‖²; one pass."""


@runtime_checkable
class SupportsGaussNewton(Protocol):
    """An operator that has a positive semi-definite relative: the Gauss–Newton matrix of the same loss and data."""

    def gauss_newton(self) -> "CurvatureOperator":
        """The relative, for preconditioners of an indefinite matrix."""


@runtime_checkable
class SupportsDouble(Protocol):
    """An operator whose products can be had in float64 though its own dtype is float32."""

    def in_double(self) -> "CurvatureOperator":
        """The same matrix with rows and products in float64."""


@runtime_checkable
class SupportsEigenbasis(Protocol):
    """An operator whose eigenvectors are known, so that any function of it can be applied without products."""

    def in_eigenbasis(self, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """rows [k, p] · f(A), with f applied to each eigenvalue."""

    def eigenvalues(self) -> Tensor:
        """All of them, [p] float64, in no order."""


class CurvatureOperator(ABC):
    """A symmetric matrix A [p, p], known by its products with rows.

    positive_semidefinite: whether A is known to be, by what it is.
    """

    positive_semidefinite: bool = False

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.dtype = dtype
        self.device = device
        self.work = Work()

    def matmat(self, rows: Tensor) -> Tensor:
        """Multiply each row with A: rows [k, p] → rows · A [k, p], in the operator's dtype.

        Raises ShapeError if `rows` is not [k, p], DtypeError if its dtype is not the operator's.
        """
        self._check(rows)
        if rows.shape[0] == 0:
            return torch.zeros_like(rows)
        self.work.passes += 1
        self.work.rows += rows.shape[0]
        return self._product(rows.detach())

    def _check(self, rows: Tensor) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise ShapeError(
                f"`rows` must be [k, p] with p={self.size}, got {tuple(rows.shape)}. Pass one vector per row."
            )
        if rows.dtype != self.dtype:
            raise DtypeError(f"`rows` must be {self.dtype} as the operator is, got {rows.dtype}. Convert the rows.")

    @abstractmethod
    def _product(self, rows: Tensor) -> Tensor:
        """rows [k, p], k > 0 → rows · A [k, p]."""

    def dense(self) -> Tensor:
        """The whole matrix [p, p] in float64, symmetrised; costs p products, in as few passes as memory allows."""
        step = max(1, IDENTITY_BYTES // (self.size * self.dtype.itemsize))
        matrix = torch.empty(self.size, self.size, dtype=torch.float64, device=self.device)
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            rows = torch.zeros(stop - start, self.size, dtype=self.dtype, device=self.device)
            rows[:, start:stop].fill_diagonal_(1.0)
            matrix[start:stop] = self.matmat(rows)
        return (matrix + matrix.T).mul_(0.5)


class MatrixOperator(CurvatureOperator):
    """A symmetric matrix that is already there. matrix: [p, p]. positive_semidefinite: whether it is known to be.

    >>> import torch
    >>> operator = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0])))
    >>> operator.matmat(torch.tensor([[1.0, 1.0]]))
    tensor([[1., 2.]])
    """

    def __init__(self, matrix: Tensor, positive_semidefinite: bool = False) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"`matrix` must be [p, p], got {tuple(matrix.shape)}. Pass a square matrix.")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.positive_semidefinite = positive_semidefinite
        self._matrix = matrix

    def in_double(self) -> "MatrixOperator":
        """The same matrix with rows and products in float64."""
        return MatrixOperator(self._matrix.double(), self.positive_semidefinite)

    def _product(self, rows: Tensor) -> Tensor:
        return rows @ self._matrix
