"""BlockKrylov: one basis for all rows and every damping."""

from dataclasses import replace

import pytest
import torch

from distinfluence.curvature import MatrixOperator
from distinfluence.errors import SettingError
from distinfluence.solvers import BlockCG, BlockKrylov, Outcome, SolverState
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import (
    SYSTEM,
    SYSTEMS,
    P,
    System,
    dense_solution,
    indefinite,
    randn,
    relative_error,
    spd,
)

DAMPINGS = [1e-1, 1e-2, 1e-3, 0.0]


class TestBlockKrylov(SolverContract[SolverState]):
    """rtol is 1e-10: error ≤ ‖residual‖ / λ_min ≤ rtol · cond · ‖x‖ ≤ 1e-6 · ‖x‖ at condition 1e4."""

    solver = BlockKrylov(damping=0.0, rtol=1e-10)
    accuracy = 1e-6

    def test_every_damping_is_solved_from_one_basis(self) -> None:
        operator, rhs = MatrixOperator(spd()), randn(5, P)
        solutions = self.solver.solve_at(self.solver.fit(operator), rhs, DAMPINGS)
        for damping, solution in zip(DAMPINGS, solutions, strict=True):
            assert solution.converged.all()
            assert relative_error(solution.x, dense_solution(spd(), damping, rhs)) <= self.accuracy
        # a block a pass until the basis holds the hardest damping, and one pass for all residuals
        assert operator.work.passes == int(solutions[-1].iterations.max()) + 1
        hardest = MatrixOperator(spd())
        self.solver.solve(self.solver.fit(hardest), rhs)
        assert operator.work.passes == hardest.work.passes

    def test_larger_dampings_need_fewer_steps(self) -> None:
        matrix, rhs = spd(200), randn(3, 200)
        solutions = self.solver.solve_at(self.solver.fit(MatrixOperator(matrix)), rhs, DAMPINGS)
        steps = [int(solution.iterations.max()) for solution in solutions]
        assert steps == sorted(steps)
        assert steps[0] < steps[2]

    @pytest.mark.parametrize("k", [1, 6])
    def test_no_method_without_a_preconditioner_needs_fewer_passes(self, k: int) -> None:
        matrix, rhs = spd(200), randn(k, 200)
        krylov, block = MatrixOperator(matrix), MatrixOperator(matrix)
        solver = replace(self.solver, rtol=1e-6)
        assert solver.solve(solver.fit(krylov), rhs).converged.all()
        other = BlockCG(0.0, rtol=1e-6)
        assert other.solve(other.fit(block), rhs).converged.all()
        assert krylov.work.passes <= block.work.passes

    @pytest.mark.parametrize("system", SYSTEMS, ids=str)
    def test_little_memory_costs_passes_and_no_accuracy(self, system: System) -> None:
        rhs = system.rhs(2)
        solver = BlockKrylov(system.damping, rtol=1e-8, basis_bytes=12 * P * 8)  # twelve vectors
        operator = MatrixOperator(system.matrix)
        solution = solver.solve(solver.fit(operator), rhs)
        assert solution.converged.all()
        # error ≤ rtol · cond
        assert relative_error(solution.x, dense_solution(system.matrix, system.damping, rhs)) <= 1e-4

    def test_dampings_that_are_not_done_when_memory_is_spent_go_on_from_there(self) -> None:
        rhs = randn(2, P)
        solver = BlockKrylov(0.0, rtol=1e-8, basis_bytes=16 * P * 8)
        solutions = solver.solve_at(solver.fit(MatrixOperator(spd(cond=1e2))), rhs, DAMPINGS)
        for damping, solution in zip(DAMPINGS, solutions, strict=True):
            assert solution.converged.all()
            assert relative_error(solution.x, dense_solution(spd(cond=1e2), damping, rhs)) <= 1e-6

    @pytest.mark.parametrize("damping", [0.0, 0.05, 0.3])
    def test_an_indefinite_system_is_solved_and_said_to_be(self, damping: float) -> None:
        rhs = randn(4, P)
        solution = self.solve(indefinite(), damping, rhs)
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(indefinite(), damping, rhs)) <= self.accuracy
        assert (solution.curvature < 0).all()
        assert "indefinite" in solution.remarks[0]

    def test_a_definite_system_has_nothing_to_remark(self) -> None:
        assert self.solve(SYSTEM.matrix, SYSTEM.damping, SYSTEM.rhs()).remarks == ()

    @pytest.mark.parametrize("maxiter", [1, 2, 5])
    def test_a_solve_that_is_stopped_early_says_so(self, maxiter: int) -> None:
        solver = replace(self.solver, maxiter=maxiter)
        operator = MatrixOperator(spd(200))
        solution = solver.solve(solver.fit(operator), randn(3, 200))
        assert solution.outcome == (Outcome.MAXITER,) * 3
        assert not solution.converged.any()
        assert operator.work.passes == maxiter + 1
        assert (solution.relative_residual > 1e-10).all()

    def test_float32_asked_for_more_than_it_has_ends_soon_and_is_not_called_converged(self) -> None:
        matrix, rhs = spd(cond=1e4).float(), randn(4, P).float()
        operator = MatrixOperator(matrix)
        solver = BlockKrylov(0.0, rtol=1e-12)
        solution = solver.solve(solver.fit(operator), rhs)
        assert solution.outcome == (Outcome.STAGNATED,) * 4
        assert operator.work.passes < 60
        assert (solution.relative_residual <= 10 * 1.2e-7 * 1e4).all()  # the attainable one is eps · cond

    def test_a_matrix_that_is_not_finite_is_no_crash(self) -> None:
        matrix = spd()
        matrix[2, 3] = matrix[3, 2] = torch.nan
        solution = self.solve(matrix, 0.1, randn(3, P))
        assert not solution.converged.any()
        assert solution.x.isfinite().all()

    @pytest.mark.parametrize(("name", "value"), [("maxiter", 0), ("maxiter", True), ("basis_bytes", 0), ("atol", -1.0)])
    def test_settings_are_checked(self, name: str, value: float) -> None:
        with pytest.raises(SettingError, match=f"`{name}` must be"):
            replace(self.solver, **{name: value})
        with pytest.raises(SettingError, match="must not both be 0"):
            BlockKrylov(0.0, rtol=0.0)
