"""What every curvature operator promises. A test class inherits `OperatorContract` and says how to make one."""

from abc import abstractmethod

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator
from distinfluence.errors import DtypeError, ShapeError


class OperatorContract:
    """Tests of a curvature operator against a dense matrix that is made another way.

    A test class inherits it and defines `make` and `matrix`.

    Attributes:
        rtol: Error that products may have, relative to ‖rows‖ · ‖matrix‖. Default: a few thousand roundings of float64.
    """

    rtol = 1e-12

    @abstractmethod
    def make(self) -> CurvatureOperator:
        """Make the operator under test.

        Returns:
            A new operator in float64.
        """

    @abstractmethod
    def matrix(self) -> Tensor:
        """Make the matrix that the operator should be, by code that shares nothing with it.

        Returns:
            The dense matrix [p, p] in float64.
        """

    def rows(self, k: int) -> Tensor:
        """Draw rows to multiply.

        Args:
            k: Number of rows.

        Returns:
            Random rows [k, p] in float64, the same each time.
        """
        p = self.make().size
        return torch.randn(k, p, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def allowed(self, rows: Tensor) -> float:
        """Bound the error of products.

        Args:
            rows: The rows that are multiplied, [k, p].

        Returns:
            The largest Frobenius norm that the error may have.
        """
        return self.rtol * float(rows.norm()) * float(torch.linalg.matrix_norm(self.matrix(), 2))

    def test_products_with_more_rows_than_parameters_are_those_of_the_matrix(self) -> None:
        rows = self.rows(self.make().size + 3)
        rows[1], rows[2] = rows[0], 0
        error = self.make().matmat(rows) - rows @ self.matrix()
        assert float(error.norm()) <= self.allowed(rows)

    def test_the_dense_matrix_is_the_matrix(self) -> None:
        identity = torch.eye(self.make().size, dtype=torch.float64)
        assert float((self.make().dense() - self.matrix()).norm()) <= self.allowed(identity)

    def test_products_are_linear_and_symmetric(self) -> None:
        operator, u, v = self.make(), self.rows(3), self.rows(6)[3:]
        along_u, along_v = operator.matmat(u), operator.matmat(v)
        both = operator.matmat(2.0 * u - 3.0 * v)
        assert float((both - (2.0 * along_u - 3.0 * along_v)).norm()) <= 5 * self.allowed(torch.cat([u, v]))
        assert float((along_u @ v.T - u @ along_v.T).norm()) <= float(v.norm()) * 2 * self.allowed(u)

    def test_a_row_gives_the_same_alone_and_in_company(self) -> None:
        operator, rows = self.make(), self.rows(40)
        error = operator.matmat(rows)[7:8] - operator.matmat(rows[7:8])
        assert float(error.norm()) <= self.allowed(rows[7:8])

    def test_the_same_product_twice_is_the_same_to_the_bit(self) -> None:
        operator, rows = self.make(), self.rows(3)
        assert torch.equal(operator.matmat(rows), operator.matmat(rows))

    def test_no_rows_give_no_rows(self) -> None:
        operator = self.make()
        assert operator.matmat(self.rows(0)).shape == (0, operator.size)

    def test_rows_that_record_a_graph_are_taken_as_values(self) -> None:
        operator, rows = self.make(), self.rows(2)
        recorded = operator.matmat(rows.clone().requires_grad_())
        assert not recorded.requires_grad
        assert torch.equal(recorded, operator.matmat(rows))

    def test_rows_are_as_they_were(self) -> None:
        rows = self.rows(3)
        before = rows.clone()
        self.make().matmat(rows)
        assert torch.equal(rows, before)

    def test_what_does_not_fit_is_refused(self) -> None:
        operator = self.make()
        with pytest.raises(ShapeError, match=rf"\[k, p\] with p={operator.size}.*one vector per row"):
            operator.matmat(torch.zeros(operator.size, dtype=torch.float64))
        with pytest.raises(DtypeError, match=r"float64 as the operator is, got torch.float32"):
            operator.matmat(torch.zeros(1, operator.size))
