"""CG: rows on their own."""

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.solvers import CG, Outcome
from distinfluence.testing.systems import P, randn, relative_error, spd

from .conjugate_contract import ConjugateContract


class Rounded(CurvatureOperator):
    """A diagonal matrix whose products are rounded to float32, row by row alike: recurrences drift."""

    def _product(self, rows: Tensor) -> Tensor:
        return (rows * torch.logspace(0, -2, self.size, dtype=torch.float64)).float().double()


class TestCG(ConjugateContract):
    solver = CG(damping=0.0, rtol=1e-10)

    def test_rows_that_have_converged_leave_the_batch(self) -> None:
        matrix = torch.diag(torch.logspace(0, -3, P, dtype=torch.float64))
        rhs = randn(8, P)
        rhs[:, 3:] *= (torch.arange(8) > 5)[:, None]  # six rows live on three eigenvectors
        solution, operator = self.run(matrix, rhs)
        assert solution.converged.all()
        assert (solution.iterations[:6] == 3).all()
        assert (solution.iterations[6:] > 20).all()
        # each step multiplies the rows that are not done, and the true residual takes all
        assert operator.work.rows == int(solution.iterations.sum()) + 8
        assert operator.work.rows < operator.work.passes * 8 / 2

    def test_a_row_is_solved_as_if_it_were_alone(self) -> None:
        rhs = randn(5, 200)
        together, _ = self.run(spd(200, cond=10), rhs)
        alone = [self.run(spd(200, cond=10), row[None])[0] for row in rhs]
        assert together.iterations.tolist() == [int(one.iterations) for one in alone]
        assert relative_error(together.x, torch.cat([one.x for one in alone])) <= 1e-8

    @pytest.mark.parametrize("maxiter", [62, 65, 71, 77])
    def test_how_many_steps_a_row_may_take_does_not_depend_on_the_others(self, maxiter: int) -> None:
        rhs = randn(6, P)
        rhs[:3, 5:] = 0  # these restart earlier, and must not get what is left to the others
        operator = Rounded(P, torch.float64, torch.device("cpu"))
        solver = CG(damping=0.0, rtol=1e-8, maxiter=maxiter)
        together = solver.solve(solver.fit(operator), rhs)
        alone = [solver.solve(solver.fit(operator), row[None]) for row in rhs]
        assert together.outcome == tuple(one.outcome[0] for one in alone)
        assert together.iterations.tolist() == [int(one.iterations) for one in alone]

    def test_negative_curvature_of_one_row_leaves_the_others(self) -> None:
        matrix = torch.diag(torch.tensor([-1.0, 1.0, 2.0, 3.0], dtype=torch.float64))
        rhs = torch.tensor([[1.0, 0, 0, 0.1], [0, 1.0, 1.0, 1.0]], dtype=torch.float64)
        solution, _ = self.run(matrix, rhs)
        assert solution.outcome == (Outcome.NEGATIVE_CURVATURE, Outcome.CONVERGED)
        assert float(solution.curvature[0]) < 0 < float(solution.curvature[1])

    def test_the_start_is_zero(self) -> None:
        solver = CG(damping=0.1, maxiter=1)
        rhs = randn(2, P)
        state = solver.fit(MatrixOperator(spd()))
        zero = torch.zeros_like(rhs)
        assert relative_error(solver.solve(state, rhs).x, solver.solve(state, rhs, zero).x) <= 1e-12
