"""The curvature matrix as a linear operator: what solvers are allowed to know of it.

An operator is a symmetric matrix A [p, p] that is only ever touched through `matmat`, one product with a block of
rows. For an operator over a data set one `matmat` is one pass over the data, whatever the number of rows; `work`
counts both, so that tests can hold a solver to its cost.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.errors import DtypeError, ShapeError

IDENTITY_BYTES = 64 * 2**20  # rows of the identity that `dense` sends through one `matmat`


@dataclass
class Work:
    """What an operator has done so far: `passes` calls of `matmat`, with `rows` right-hand sides in all."""

    passes: int = 0
    rows: int = 0


class CurvatureOperator(ABC):
    """A symmetric matrix A [p, p], known by its products with rows."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.dtype = dtype
        self.device = device
        self.work = Work()

    def matmat(self, rows: Tensor) -> Tensor:
        """Multiply each row with A: rows [k, p] → rows · A [k, p], in the operator's dtype.

        Raises ShapeError if `rows` is not [k, p], DtypeError if its dtype is not the operator's.
        """
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise ShapeError(
                f"`rows` must be [k, p] with p={self.size}, got {tuple(rows.shape)}. Pass one vector per row."
            )
        if rows.dtype != self.dtype:
            raise DtypeError(f"`rows` must be {self.dtype} as the operator is, got {rows.dtype}. Convert the rows.")
        if rows.shape[0] == 0:
            return torch.zeros_like(rows)
        self.work.passes += 1
        self.work.rows += rows.shape[0]
        return self._product(rows.detach())

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
    """A symmetric matrix that is already there. matrix: [p, p].

    >>> import torch
    >>> operator = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0])))
    >>> operator.matmat(torch.tensor([[1.0, 1.0]]))
    tensor([[1., 2.]])
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"`matrix` must be [p, p], got {tuple(matrix.shape)}. Pass a square matrix.")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self._matrix = matrix

    def _product(self, rows: Tensor) -> Tensor:
        return rows @ self._matrix
