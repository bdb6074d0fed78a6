"""BlockCG: all rows in one search space."""

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import MatrixOperator
from distinfluence.solvers import CG, BlockCG, Outcome
from distinfluence.solvers.block_cg import independent_rows, orthonormal_rows
from distinfluence.testing.systems import MATRICES, P, dense_solution, diagonal_with_zeros, randn, relative_error, spd

from .conjugate_contract import ConjugateContract


class TestBlockCG(ConjugateContract):
    solver = BlockCG(damping=0.0, rtol=1e-10)

    @pytest.mark.parametrize("k", [2, 7, 16])
    def test_a_pass_serves_all_rows(self, k: int) -> None:
        solution, operator = self.run(spd(), randn(k, P), damping=1e-3)
        assert solution.converged.all()
        assert operator.work.passes == int(solution.iterations.max()) + 1
        assert operator.work.rows <= operator.work.passes * k

    def test_a_block_needs_fewer_passes_than_rows_on_their_own(self) -> None:
        matrix, rhs = spd(200, cond=1e4), randn(16, 200)
        block, plain = MatrixOperator(matrix), MatrixOperator(matrix)
        for solver, operator in ((BlockCG(0.0, rtol=1e-8), block), (CG(0.0, rtol=1e-8), plain)):
            assert solver.solve(solver.fit(operator), rhs).converged.all()
        assert block.work.passes < plain.work.passes / 4

    @pytest.mark.parametrize("k", [P, P + 9])
    def test_as_many_rows_as_parameters_end_in_two_steps(self, k: int) -> None:
        rhs = randn(k, P)
        solution, _ = self.run(spd(), rhs)
        assert solution.converged.all()
        assert int(solution.iterations.max()) <= 2
        assert relative_error(solution.x, dense_solution(spd(), 0.0, rhs)) <= self.accuracy

    def test_rows_that_have_converged_leave_the_search_space(self) -> None:
        matrix = torch.diag(torch.logspace(0, -3, P, dtype=torch.float64))
        rhs = randn(4, P)
        rhs[:3, 3:] = 0  # three rows live on three eigenvectors
        solution, operator = self.run(matrix, rhs)
        assert solution.converged.all()
        assert int(solution.iterations[:3].max()) <= 2
        steps = int(solution.iterations[3])
        assert steps > 20
        assert operator.work.rows <= 2 * 4 + (steps - 2) + 4

    @pytest.mark.parametrize("k", [1, 4])
    def test_flat_directions_are_seen_at_once(self, k: int) -> None:
        matrix = diagonal_with_zeros()  # five distinct eigenvalues, one of them zero
        solution, operator = self.run(matrix, randn(k, P))
        assert solution.outcome == (Outcome.SINGULAR,) * k
        assert operator.work.passes <= 7

    def test_rows_that_come_twice_cost_no_passes(self) -> None:
        matrix, rhs = spd(200), randn(16, 200)
        once, operator = self.run(matrix, rhs)
        twice, operator_of_twice = self.run(matrix, torch.cat([rhs, -2 * rhs]))
        assert once.converged.all()
        assert twice.converged.all()
        assert operator_of_twice.work.passes <= 1.2 * operator.work.passes
        # a product for each independent row and step; the true residual takes all rows
        assert operator_of_twice.work.rows <= 1.2 * operator.work.rows + 2 * 32

    def test_dependent_rows_need_no_more_passes_than_a_basis_of_them(self) -> None:
        matrix, basis = spd(200), randn(8, 200)
        rhs = randn(20, 8, seed=5) @ basis
        few, operator = self.run(matrix, basis)
        many, operator_of_many = self.run(matrix, rhs)
        assert few.converged.all()
        assert many.converged.all()
        assert relative_error(many.x, dense_solution(matrix, 0.0, rhs)) <= self.accuracy
        assert operator_of_many.work.passes <= 1.2 * operator.work.passes + 2

    def test_negative_curvature_for_one_row_stops_all_that_are_not_done(self) -> None:
        matrix = torch.diag(torch.tensor([-1.0, 1.0, 2.0, 3.0], dtype=torch.float64))
        rhs = torch.tensor([[1.0, 0, 0, 0.1], [0, 1.0, 1.0, 1.0]], dtype=torch.float64)
        solution, _ = self.run(matrix, rhs)
        assert solution.outcome == (Outcome.NEGATIVE_CURVATURE,) * 2
        assert (solution.curvature < 0).all()

    def test_rows_of_very_different_size_are_all_solved(self) -> None:
        rhs = torch.logspace(-12, 12, 9, dtype=torch.float64)[:, None] * randn(9, P)
        solution, _ = self.run(spd(), rhs)
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(spd(), 0.0, rhs)) <= self.accuracy


def _dependent() -> Tensor:
    a, b, c = randn(3, 20)
    return torch.stack([a, b, a + b, c, a - 2 * c, b])


ROWS = {
    "independent": (randn(4, 20), 4),
    "duplicate": (randn(3, 20).repeat(3, 1), 3),
    "dependent": (_dependent(), 3),
    "with zeros": (torch.cat([torch.zeros(2, 20, dtype=torch.float64), randn(3, 20)]), 3),
    "of very different size": (torch.logspace(-150, 100, 5, dtype=torch.float64)[:, None] * randn(5, 20), 5),
    "more than parameters": (randn(30, 20), 20),
    "one": (randn(1, 20), 1),
    "all zero": (torch.zeros(3, 20, dtype=torch.float64), 0),
    "none": (torch.zeros(0, 20, dtype=torch.float64), 0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(ROWS))
def test_orthonormal_rows_are_a_basis_of_the_right_rank(name: str, dtype: torch.dtype) -> None:
    rows, rank = ROWS[name]
    if dtype is torch.float32 and name == "of very different size":
        rows = torch.logspace(-30, 30, 5, dtype=torch.float64)[:, None] * randn(5, 20)
    rows = rows.to(dtype)
    eps = torch.finfo(dtype).eps
    basis = orthonormal_rows(rows)
    assert basis.shape == (rank, 20)
    assert basis.dtype == dtype
    basis = basis.double()
    assert torch.allclose(basis @ basis.T, torch.eye(rank, dtype=torch.float64), atol=50 * eps)
    size = rows.double().norm(dim=1, keepdim=True)
    unit = rows.double() / torch.where(size > 0, size, 1.0)
    assert torch.allclose(unit @ basis.T @ basis, unit, atol=100 * eps)


@pytest.mark.parametrize("name", list(ROWS))
def test_independent_rows_mix_to_the_rows(name: str) -> None:
    rows, rank = ROWS[name]
    mix, basis = independent_rows(rows)
    assert basis.shape == (rank, 20)
    assert mix.shape == (rows.shape[0], rank)
    size = rows.norm(dim=1, keepdim=True)
    unit = torch.where(size > 0, size, 1.0)
    assert torch.allclose(mix @ basis / unit, rows / unit, atol=1e-13)


def test_independent_rows_are_left_as_they_are() -> None:
    rows = randn(4, 20)
    mix, basis = independent_rows(rows)
    assert torch.equal(basis, rows)
    assert basis.data_ptr() != rows.data_ptr()
    assert torch.equal(mix, torch.eye(4, dtype=torch.float64))


def test_the_matrices_of_these_tests_are_as_their_names_say() -> None:
    values = {name: torch.linalg.eigvalsh(matrix) for name, matrix in MATRICES.items()}
    assert float(values["random"][-1] / values["random"][0]) == pytest.approx(1e4)
    assert int((values["low rank"] > 1e-10).sum()) == 9
    assert int((values["diagonal"] < 1e-10).sum()) == P // 5
