"""Chebyshev: the contract, an interval instead of inner products, and steps that are known beforehand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.solvers import Chebyshev, Outcome
from distinfluence.solvers.chebyshev import Interval
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import (
    MATRICES,
    SYSTEM,
    P,
    dense_solution,
    indefinite,
    randn,
    relative_error,
    spd,
    with_spectrum,
)


class Noisy(CurvatureOperator):
    """No matrix: every product is another one, as of a model in train mode."""

    def _product(self, rows: Tensor) -> Tensor:
        return rows * (1 + 9 * torch.rand_like(rows))


class TestChebyshev(SolverContract[Interval]):
    """rtol is 1e-10: error ≤ rtol · cond · ‖x‖ ≤ 1e-6 · ‖x‖ at condition 1e4."""

    solver = Chebyshev(damping=0.0, rtol=1e-10)
    accuracy = 1e-6

    @pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-3])
    def test_the_number_of_steps_is_known_beforehand(self, damping: float) -> None:
        operator = MatrixOperator(spd(), positive_semidefinite=True)
        solver = Chebyshev(damping, rtol=1e-8)
        state = solver.fit(operator)
        before = operator.work.passes
        solution = solver.solve(state, randn(5, P))
        assert solution.converged.all()
        steps = int(solution.iterations.max())
        assert steps <= state.steps(1e8)
        assert steps >= 0.5 * state.steps(1e8)  # and the bound is no idle one
        assert operator.work.passes - before == steps + 1

    def test_another_damping_needs_no_new_ends(self) -> None:
        operator = MatrixOperator(spd(), positive_semidefinite=True)
        solver = Chebyshev(1.0, rtol=1e-10)
        state = solver.fit(operator)
        fitted = operator.work.passes
        other = solver.at(1e-2)
        assert operator.work.passes == fitted <= 40
        solution = other.solve(other.adapt(state), SYSTEM.rhs())
        assert relative_error(solution.x, dense_solution(spd(), 1e-2, SYSTEM.rhs())) <= self.accuracy

    def test_rows_that_converge_early_leave(self) -> None:
        matrix = torch.diag(torch.linspace(0.01, 1, P, dtype=torch.float64))
        rhs = randn(2, P)
        solution = self.solve(matrix, 0.0, torch.cat([rhs, torch.zeros(1, P, dtype=torch.float64)]))
        assert solution.converged.all()
        assert solution.iterations[2] == 0

    @pytest.mark.parametrize("damping", [0.0, 0.05])
    def test_an_indefinite_matrix_is_said_and_not_iterated_on(self, damping: float) -> None:
        operator = MatrixOperator(indefinite())
        solver = Chebyshev(damping)
        state = solver.fit(operator)
        assert state.positive_definite is False
        before = operator.work.passes
        solution = solver.solve(state, randn(3, P))
        assert solution.outcome == (Outcome.NEGATIVE_CURVATURE,) * 3
        smallest = float(torch.linalg.eigvalsh(indefinite())[0]) + damping
        assert torch.allclose(solution.curvature, torch.tensor(smallest).double(), atol=0.02)  # Lanczos stops at 1e-2
        assert operator.work.passes - before <= 1

    @pytest.mark.parametrize("seen", [7e-4, -5e-4], ids=["positive", "negative"])
    def test_a_negative_eigenvalue_that_the_fit_has_missed_is_found_by_its_growth(self, seen: float) -> None:
        """Hessians have many small negative eigenvalues, and Lanczos stops at a hundredth of the norm."""
        values = torch.cat([torch.tensor([-2e-3, -1.5e-3]), torch.logspace(-6, 0, 400)])
        operator = MatrixOperator(with_spectrum(values))
        solver = Chebyshev(1e-3, rtol=1e-6)
        state = solver.fit(operator)
        state = replace(state, extremes=replace(state.extremes, smallest=seen))
        before = operator.work.passes
        solution = solver.solve(state, randn(3, 402))
        assert solution.outcome == (Outcome.NEGATIVE_CURVATURE,) * 3
        assert (solution.relative_residual <= 1).all()
        # by the residuals' Rayleigh quotient, which grew twofold at least: most of them is that eigenvector
        assert ((solution.curvature > -1e-3 - 1e-12) & (solution.curvature < -0.5e-3)).all()
        assert operator.work.passes - before <= state.steps(1e6) + 2  # a sweep, a quotient, the true residual

    def test_a_small_negative_eigenvalue_that_damping_outweighs_is_within_the_interval(self) -> None:
        values = torch.cat([torch.tensor([-5e-3, -4e-3]), torch.linspace(0, 1, P - 2)])
        matrix = with_spectrum(values)
        solver = self.with_damping(1e-2)
        assert isinstance(solver, Chebyshev)
        state = solver.fit(MatrixOperator(matrix))
        solution = solver.solve(state, randn(3, P))
        assert solution.converged.all()
        assert state.lower <= 5e-3 + 1e-9  # or it would take more steps than are said beforehand
        assert int(solution.iterations.max()) <= state.steps(1e10)
        assert relative_error(solution.x, dense_solution(matrix, 1e-2, randn(3, P))) <= self.accuracy

    def test_products_that_are_no_matrix_come_to_an_end(self) -> None:
        torch.manual_seed(0)
        operator = Noisy(P, torch.float64, torch.device("cpu"))
        solver = Chebyshev(0.1, rtol=1e-8)
        solution = solver.solve(solver.fit(operator), randn(3, P))
        assert not solution.converged.any()
        assert (solution.relative_residual <= 1).all()
        assert operator.work.passes < 1000

    def test_the_fit_says_how_many_steps_a_digit_takes(self) -> None:
        (remark,) = Chebyshev(1e-2).fit(MatrixOperator(spd(), positive_semidefinite=True)).remarks
        assert "at λ = 0.01" in remark
        steps = int(remark.partition("about ")[2].split()[0])
        assert steps == pytest.approx(0.5 * 10 * math.log(10), rel=0.1)  # ½·√cond·ln 10 at a condition of 101
        (remark,) = Chebyshev(1e-2).fit(MatrixOperator(indefinite())).remarks
        assert "no row will be solved" in remark

    @pytest.mark.parametrize("factor", [0.9, 0.3, 0.01])
    def test_an_interval_that_misses_the_upper_end_is_widened(self, factor: float) -> None:
        operator = MatrixOperator(SYSTEM.matrix)
        solver = Chebyshev(SYSTEM.damping, rtol=1e-8)
        state = solver.fit(operator)
        extremes = replace(state.extremes, largest=factor * state.extremes.largest, largest_residual=0.0)
        before = operator.work.passes
        solution = solver.solve(replace(state, extremes=extremes), SYSTEM.rhs())
        assert solution.converged.all()
        # it takes few steps to see it, and one quotient to know how far to go: not twice the steps of a right one
        assert operator.work.passes - before <= 2 * state.steps(1e8)
        assert relative_error(solution.x, dense_solution(SYSTEM.matrix, SYSTEM.damping, SYSTEM.rhs())) <= 1e-8 * 102

    @pytest.mark.parametrize("maxiter", [1, 3])
    def test_a_solve_that_is_stopped_early_says_so(self, maxiter: int) -> None:
        solver = Chebyshev(0.0, rtol=1e-10, maxiter=maxiter)
        solution = solver.solve(solver.fit(MatrixOperator(spd())), randn(3, P))
        assert solution.outcome == (Outcome.MAXITER,) * 3
        assert solution.iterations.tolist() == [maxiter] * 3

    def test_restoring_takes_no_pass(self) -> None:
        solver = Chebyshev(SYSTEM.damping, rtol=1e-8)
        arrays = solver.state_arrays(solver.fit(MatrixOperator(SYSTEM.matrix)))
        operator = MatrixOperator(SYSTEM.matrix)
        assert solver.restore(operator, arrays).extremes == solver.fit(MatrixOperator(SYSTEM.matrix)).extremes
        assert operator.work.passes == 0

    @pytest.mark.parametrize("name", [name for name in MATRICES if name != "low rank"])
    def test_a_matrix_that_is_not_finite_is_no_crash(self, name: str) -> None:
        matrix = MATRICES[name].clone()
        matrix[0, 0] = torch.nan
        solution = self.solve(matrix, 0.1, randn(3, len(matrix)))
        assert not solution.converged.any()
        assert solution.x.isfinite().all()
