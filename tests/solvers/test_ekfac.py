"""Ekfac: the contract on matrices with known eigenvectors, and EKFAC as a preconditioner."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import MatrixOperator
from distinfluence.errors import SettingError, ShapeError, UnsupportedOperatorError
from distinfluence.solvers import BlockCG, Ekfac, EkfacPreConditioner, Outcome
from distinfluence.solvers.ekfac import EigenbasisState
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import SYSTEM, P, diagonal_with_zeros, relative_error


class Decomposed(MatrixOperator):
    """A matrix whose eigenvectors are known."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        values, vectors = torch.linalg.eigh(matrix.double())
        self._values: Tensor = values
        self._vectors: Tensor = vectors.to(matrix.dtype)

    def in_eigenbasis(self, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        found: Tensor = rows @ self._vectors * function(self._values).to(rows.dtype) @ self._vectors.T
        return found

    def eigenvalues(self) -> Tensor:
        return self._values


class TestEkfac(SolverContract[EigenbasisState]):
    """Exact for the matrix whose eigenvectors are known."""

    solver = Ekfac(damping=0.0)
    accuracy = 1e-8

    def operator(self, matrix: Tensor) -> Decomposed:
        return Decomposed(matrix)

    def test_another_damping_and_a_solve_take_no_product_but_that_of_the_residual(self) -> None:
        operator = Decomposed(SYSTEM.matrix)
        state = Ekfac(0.1).fit(operator)
        assert operator.work.passes == 0
        solver = Ekfac(0.5)
        solver.solve(solver.adapt(state), SYSTEM.rhs(3))
        assert (operator.work.passes, operator.work.rows) == (1, 3)

    def test_without_damping_a_singular_matrix_gets_its_pseudo_inverse(self) -> None:
        matrix = diagonal_with_zeros()
        state = Ekfac(0.0).fit(Decomposed(matrix))
        assert any("pseudo-inverse" in remark for remark in state.remarks)
        rhs = torch.ones(2, matrix.shape[0], dtype=torch.float64)
        x = Ekfac(0.0).solve(state, rhs).x
        assert relative_error(x, rhs @ torch.linalg.pinv(matrix)) <= 1e-12

    def test_an_operator_without_an_eigenbasis_is_refused(self) -> None:
        with pytest.raises(UnsupportedOperatorError, match="eigenvectors"):
            Ekfac(0.1).fit(MatrixOperator(SYSTEM.matrix))

    def test_a_tolerance_must_be_one(self) -> None:
        with pytest.raises(SettingError, match="rtol"):
            Ekfac(0.1, rtol=2.0)


class Known:
    """The exact inverse, as a fitted EKFAC would give it."""

    n_parameters = P

    def inverse(self, rows: Tensor, damping: float) -> Tensor:
        found: Tensor = torch.linalg.solve(SYSTEM.matrix + damping * torch.eye(P).double(), rows.T).T
        return found


def test_a_preconditioner_that_is_the_inverse_needs_one_iteration() -> None:
    solver = BlockCG(SYSTEM.damping or 0.1, rtol=1e-8, preconditioner=EkfacPreConditioner(Known()))
    solution = solver.solve(solver.fit(MatrixOperator(SYSTEM.matrix)), SYSTEM.rhs(4))
    assert solution.iterations.tolist() == [1, 1, 1, 1]
    assert set(solution.outcome) == {Outcome.CONVERGED}


def test_a_preconditioner_of_another_model_or_without_damping_is_refused() -> None:
    with pytest.raises(ShapeError, match="parameters"):
        EkfacPreConditioner(Known()).fit(MatrixOperator(torch.eye(P + 1).double()), 0.1)
    with pytest.raises(SettingError, match="hessian_regularization"):
        EkfacPreConditioner(Known()).fit(MatrixOperator(SYSTEM.matrix), 0.0)
