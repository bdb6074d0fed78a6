"""Chebyshev: the contract, an interval instead of inner products, and steps that are known beforehand."""

from dataclasses import replace

import pytest
import torch

from distinfluence.curvature import MatrixOperator
from distinfluence.solvers import Chebyshev, Outcome
from distinfluence.solvers.chebyshev import Interval

from .contract import SolverContract
from .systems import MATRICES, SYSTEM, P, dense_solution, indefinite, randn, relative_error, spd


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

    @pytest.mark.parametrize("factor", [0.9, 0.3])
    def test_an_interval_that_misses_the_upper_end_is_widened(self, factor: float) -> None:
        operator = MatrixOperator(SYSTEM.matrix)
        solver = Chebyshev(SYSTEM.damping, rtol=1e-8)
        state = solver.fit(operator)
        extremes = replace(state.extremes, largest=factor * state.extremes.largest, largest_residual=0.0)
        solution = solver.solve(replace(state, extremes=extremes), SYSTEM.rhs())
        assert solution.converged.all()
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
