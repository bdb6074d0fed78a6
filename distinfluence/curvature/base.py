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

from distinfluence.errors import DtypeError, ShapeError, UnsupportedOperatorError

IDENTITY_BYTES = 64 * 2**20  # rows of the identity that `dense` sends through one `matmat`


@dataclass
class Work:
    """The work that an operator has done so far.

    Attributes:
        passes: Number of calls of `matmat`, each of which is one pass over the data.
        rows: Number of right-hand sides in all these calls.
        batches: Number of products with the matrix of one mini-batch. They do not count as passes.
    """

    passes: int = 0
    rows: int = 0
    batches: int = 0


@dataclass(frozen=True)
class PlannedWork:
    """Work that is counted before it is done, for plans.

    Attributes:
        passes: Passes over the data.
        rows: Products of a row with the matrix, in all passes together.
        derivatives: Gradients or forward derivatives of every sample, in addition to the products.
        flops: Floating-point operations in addition to both.
    """

    passes: int = 0
    rows: int = 0
    derivatives: int = 0
    flops: float = 0.0

    def __add__(self, other: "PlannedWork") -> "PlannedWork":
        """Add other work."""
        return PlannedWork(
            self.passes + other.passes,
            self.rows + other.rows,
            self.derivatives + other.derivatives,
            self.flops + other.flops,
        )


@runtime_checkable
class SupportsBatches(Protocol):
    """An operator that is a mean over mini-batches, for stochastic solvers.

    Attributes:
        n_batches: Number of mini-batches.
        batch_sizes: Number of samples of each mini-batch.
        in_any_order: Whether `batch_matmat` may be called with the indices in any order at no extra cost. If not,
            call it with 0, 1, 2, … again and again.
    """

    n_batches: int
    batch_sizes: tuple[int, ...]
    in_any_order: bool

    def batch_matmat(self, index: int, rows: Tensor) -> Tensor:
        """Multiply rows with the mean matrix of one mini-batch. The product counts in `work.batches`, not as a pass.

        Args:
            index: Index of the mini-batch, 0 to `n_batches` − 1.
            rows: Vectors, [k, p].

        Returns:
            The products, [k, p].
        """


@runtime_checkable
class SupportsSampleGradients(Protocol):
    """An operator over samples whose gradients g_j are available."""

    def inverse_harmonic_mean(self, rows: Tensor, damping: float) -> Tensor:
        """Multiply rows with (1/N) Σ_j (g_j g_jᵀ + λI)⁻¹, each inverse by Sherman–Morrison; one pass.

        Args:
            rows: Vectors, [k, p].
            damping: λ > 0.

        Returns:
            The products, [k, p].
        """

    def mean_square_gradient(self) -> float:
        """Compute the mean squared norm of the samples' gradients; one pass.

        Returns:
            (1/N) Σ_j ‖g_j‖².
        """


@runtime_checkable
class SupportsGaussNewton(Protocol):
    """An operator with a positive semi-definite counterpart: the Gauss–Newton matrix of the same loss and data."""

    def gauss_newton(self) -> "CurvatureOperator":
        """Return the Gauss–Newton matrix, for preconditioners of an indefinite matrix.

        Returns:
            The operator of that matrix.
        """


@runtime_checkable
class SupportsDouble(Protocol):
    """An operator whose products are available in float64 though its own dtype is float32."""

    def in_double(self) -> "CurvatureOperator":
        """Return the same matrix with rows and products in float64.

        Returns:
            The operator in float64.
        """


@runtime_checkable
class SupportsEigenbasis(Protocol):
    """An operator whose eigenvectors are known, so that any function of it can be applied without products."""

    def in_eigenbasis(self, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Multiply rows with f(A).

        Args:
            rows: Vectors, [k, p].
            function: f, which is applied to each eigenvalue.

        Returns:
            rows · f(A), [k, p].
        """

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, in no particular order.

        Returns:
            [p] in float64.
        """


class CurvatureOperator(ABC):
    """A symmetric matrix A [p, p], known by its products with rows.

    Args:
        size: p, the number of rows and columns.
        dtype: The dtype of rows and products.
        device: The device of rows and products.

    Attributes:
        positive_semidefinite: Whether A is known to be positive semi-definite by construction.
    """

    positive_semidefinite: bool = False

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.dtype = dtype
        self.device = device
        self.work = Work()

    def matmat(self, rows: Tensor) -> Tensor:
        """Multiply each row with A; one pass.

        Args:
            rows: Vectors, [k, p], in the operator's dtype.

        Returns:
            rows · A, [k, p], in the operator's dtype.

        Raises:
            ShapeError: If `rows` is not [k, p].
            DtypeError: If the dtype of `rows` is not the operator's.
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

    @property
    def product_flops(self) -> float:
        """Floating-point operations of the product with one row."""
        return 2.0 * self.size**2

    @property
    def dense_work(self) -> PlannedWork:
        """The work of `dense`, before it is done."""
        return PlannedWork(-(-self.size // self._columns_at_once), self.size)

    @property
    def _columns_at_once(self) -> int:
        return max(1, IDENTITY_BYTES // (self.size * self.dtype.itemsize))

    def dense(self) -> Tensor:
        """Compute the whole matrix; costs p products, in as few passes as memory allows.

        Returns:
            A, [p, p] in float64, symmetrised.
        """
        step = self._columns_at_once
        matrix = torch.empty(self.size, self.size, dtype=torch.float64, device=self.device)
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            rows = torch.zeros(stop - start, self.size, dtype=self.dtype, device=self.device)
            rows[:, start:stop].fill_diagonal_(1.0)
            matrix[start:stop] = self.matmat(rows)
        return (matrix + matrix.T).mul_(0.5)


class MatrixOperator(CurvatureOperator):
    """A symmetric matrix that is given as a tensor.

    Args:
        matrix: The matrix, [p, p].
        positive_semidefinite: Whether the matrix is known to be positive semi-definite.

    Raises:
        ShapeError: If `matrix` is not square.

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
        """Return the same matrix with rows and products in float64.

        Returns:
            The operator in float64.
        """
        return MatrixOperator(self._matrix.double(), self.positive_semidefinite)

    def _product(self, rows: Tensor) -> Tensor:
        return rows @ self._matrix


class BlockDamped(CurvatureOperator):
    """A plus a multiple of the identity in each block, for solvers with one damping. added: [p], ≥ 0."""

    def __init__(self, operator: CurvatureOperator, added: Tensor) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        self.positive_semidefinite = operator.positive_semidefinite
        self._operator = operator
        self._added = added

    def in_double(self) -> "BlockDamped":
        """Return the same matrix with rows and products in float64.

        Returns:
            The operator in float64.

        Raises:
            UnsupportedOperatorError: If A has no products in float64.
        """
        if not isinstance(self._operator, SupportsDouble):
            raise UnsupportedOperatorError(f"`{type(self._operator).__name__}` has no products in float64.")
        return BlockDamped(self._operator.in_double(), self._added.double())

    def _product(self, rows: Tensor) -> Tensor:
        return torch.addcmul(self._operator.matmat(rows), rows, self._added)
