"""What every solver promises. A test class inherits `SolverContract` and adds what is special to its solver."""

import math
import pickle
from dataclasses import FrozenInstanceError, is_dataclass, replace
from typing import Generic, TypeVar

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.errors import DistinfluenceError, DtypeError, NonFiniteError, SettingError, ShapeError
from distinfluence.solvers import Outcome, Solution, Solver, SolverState
from distinfluence.testing.systems import (
    SYSTEM,
    SYSTEMS,
    System,
    dense_solution,
    diagonal_with_zeros,
    low_rank,
    randn,
    relative_error,
    relative_residual,
)

StateT = TypeVar("StateT", bound=SolverState)


class SolverForm(Generic[StateT]):
    """Tests of form, order, refusals and honest residuals, which hold for solvers that approximate, too.

    Attributes:
        solver: The solver under test. Its damping is replaced in each test.
        accuracy: Relative difference that repeated solves may have.
    """

    solver: Solver[StateT]
    accuracy: float

    def operator(self, matrix: Tensor) -> CurvatureOperator:
        """Return the matrix in the form that the solver takes.

        Args:
            matrix: A symmetric matrix, [p, p].

        Returns:
            An operator; a `MatrixOperator` unless a test class overrides this method.
        """
        return MatrixOperator(matrix)

    def with_damping(self, damping: float) -> Solver[StateT]:
        """Return the solver with another damping.

        Args:
            damping: The damping λ, an absolute number.

        Returns:
            The same solver at this damping.
        """
        assert is_dataclass(self.solver)
        return replace(self.solver, damping=damping)

    def solve(self, matrix: Tensor, damping: float, rhs: Tensor) -> Solution:
        """Solve one system.

        Args:
            matrix: A symmetric matrix, [p, p].
            damping: The damping λ, an absolute number.
            rhs: Right-hand sides, [k, p].

        Returns:
            What the solver makes of (matrix + λI) x = rhs.
        """
        solver = self.with_damping(damping)
        return solver.solve(solver.fit(self.operator(matrix)), rhs)

    def test_no_rows_give_no_rows(self) -> None:
        solution = self.solve(SYSTEM.matrix, SYSTEM.damping, SYSTEM.rhs(0))
        assert solution.x.shape == SYSTEM.rhs(0).shape
        assert solution.outcome == ()
        assert solution.converged.shape == solution.iterations.shape == (0,)
        assert solution.relative_residual.shape == solution.curvature.shape == (0,)

    def test_the_order_of_rows_is_the_order_of_solutions(self) -> None:
        rhs = SYSTEM.rhs(6)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        x = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs).x
        permuted = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs[order]).x
        assert relative_error(permuted, x[order]) <= 2 * self.accuracy

    def test_how_rows_are_grouped_changes_nothing(self) -> None:
        rhs = SYSTEM.rhs(7)
        together = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs).x
        groups = [self.solve(SYSTEM.matrix, SYSTEM.damping, group).x for group in rhs.split(3)]
        assert relative_error(torch.cat(groups), together) <= 2 * self.accuracy

    def test_rows_of_zeros_alone_are_solved(self) -> None:
        rhs = torch.zeros(3, SYSTEM.matrix.shape[0], dtype=torch.float64)
        solution = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs)
        assert (solution.x == 0).all()
        assert solution.converged.all()

    def test_what_a_solution_says_has_one_entry_for_each_row(self) -> None:
        rhs = SYSTEM.rhs(4)
        solution = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs)
        assert (solution.x.shape, solution.x.dtype) == (rhs.shape, rhs.dtype)
        for field in (solution.relative_residual, solution.curvature):
            assert (field.shape, field.dtype) == ((4,), torch.float64)
        assert (solution.iterations.shape, solution.iterations.dtype) == ((4,), torch.int64)
        assert (solution.converged.shape, solution.converged.dtype) == ((4,), torch.bool)
        assert all(isinstance(outcome, Outcome) for outcome in solution.outcome)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_the_relative_residual_is_that_of_the_returned_rows(self, dtype: torch.dtype) -> None:
        matrix, rhs = SYSTEM.matrix.to(dtype), SYSTEM.rhs().to(dtype)
        solution = self.solve(matrix, SYSTEM.damping, rhs)
        expected = relative_residual(matrix, SYSTEM.damping, rhs, solution.x)
        # rounding of the product: eps · ‖A + λI‖ · ‖x‖ / ‖rhs‖ ≤ eps · cond
        assert float((solution.relative_residual - expected).abs().max()) <= 102 * torch.finfo(dtype).eps

    def test_matrix_and_rows_are_as_they_were(self) -> None:
        matrix, rhs = SYSTEM.matrix, SYSTEM.rhs()
        before = matrix.clone(), rhs.clone()
        solver = self.with_damping(SYSTEM.damping)
        state = solver.fit(self.operator(matrix))
        first = solver.solve(state, rhs).x
        second = solver.solve(state, rhs).x
        assert torch.equal(matrix, before[0])
        assert torch.equal(rhs, before[1])
        assert relative_error(second, first) <= 2 * self.accuracy  # nor has the state changed

    def test_a_solver_survives_pickling(self) -> None:
        solver = self.with_damping(SYSTEM.damping)
        copy = pickle.loads(pickle.dumps(solver))
        assert copy == solver
        x = copy.solve(copy.fit(self.operator(SYSTEM.matrix)), SYSTEM.rhs()).x
        assert relative_error(x, self.solve(SYSTEM.matrix, SYSTEM.damping, SYSTEM.rhs()).x) <= 2 * self.accuracy

    def test_a_state_survives_pickling(self) -> None:
        solver = self.with_damping(SYSTEM.damping)
        state = solver.fit(self.operator(SYSTEM.matrix))
        copy: StateT = pickle.loads(pickle.dumps(state))
        x = solver.solve(state, SYSTEM.rhs()).x
        assert relative_error(solver.solve(copy, SYSTEM.rhs()).x, x) <= 2 * self.accuracy

    def test_a_state_restored_from_its_arrays_gives_the_same_solution(self) -> None:
        solver = self.with_damping(SYSTEM.damping)
        state = solver.fit(self.operator(SYSTEM.matrix))
        arrays = pickle.loads(pickle.dumps(solver.state_arrays(state)))
        restored = solver.restore(self.operator(SYSTEM.matrix), arrays)
        x = solver.solve(state, SYSTEM.rhs()).x
        assert relative_error(solver.solve(restored, SYSTEM.rhs()).x, x) <= 2 * self.accuracy

    @pytest.mark.parametrize("shape", [(40,), (3, 39), (40, 3), (1, 3, 40)])
    def test_rows_of_another_shape_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeError, match=r"`rhs` must be \[k, p\] with p=40, got \(.*one row per right-hand side"):
            self.solve(SYSTEM.matrix, SYSTEM.damping, torch.zeros(shape, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
    def test_rows_of_another_dtype_are_refused(self, dtype: torch.dtype) -> None:
        with pytest.raises(DtypeError, match=rf"`rhs` must be torch.float64 as the operator is, got {dtype}"):
            self.solve(SYSTEM.matrix, SYSTEM.damping, torch.zeros(3, 40, dtype=dtype))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_rows_that_are_not_finite_are_refused_by_number(self, bad: float) -> None:
        rhs = SYSTEM.rhs(4)
        rhs[1, 2] = rhs[3, 0] = bad
        with pytest.raises(NonFiniteError, match=r"`rhs` must be finite.*rows \[1, 3\] \(2 of 4\)"):
            self.solve(SYSTEM.matrix, SYSTEM.damping, rhs)

    @pytest.mark.parametrize("damping", [-1e-3, math.nan, math.inf, "0.1", None, True])
    def test_a_damping_that_is_not_a_number_from_zero_is_refused(self, damping: float) -> None:
        with pytest.raises(SettingError, match=r"`damping` must be a finite number ≥ 0, got") as caught:
            self.with_damping(damping)
        assert isinstance(caught.value, DistinfluenceError)
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize("rtol", [-1e-7, 1.0, 1e7, math.nan, "1e-7", True])
    def test_a_relative_tolerance_outside_of_zero_to_one_is_refused(self, rtol: float) -> None:
        assert is_dataclass(self.solver)
        with pytest.raises(SettingError, match=r"`rtol` must be a number from 0 to below 1, got"):
            replace(self.solver, rtol=rtol)

    def test_a_solver_is_a_value(self) -> None:
        assert self.with_damping(0.25) == self.with_damping(0.25) != self.with_damping(0.5)
        assert hash(self.with_damping(0.25)) == hash(self.with_damping(0.25))
        with pytest.raises(FrozenInstanceError):
            self.solver.damping = 1.0


class SolverContract(SolverForm[StateT]):
    """Tests of solvers that converge to the exact solution, next to those of `SolverForm`.

    Attributes:
        solver: The solver under test. Its damping is replaced in each test.
        accuracy: Largest ‖x − exact‖ / ‖exact‖ on the systems, whose condition is 1e4 at most.
        keeps_float32: Whether x is float32 where the rows are.
        least_damping: Damping relative to ‖matrix‖ below which a system takes too many steps to be tested.
        unsolvable: Outcome of rows that no x solves.
    """

    keeps_float32 = True
    least_damping = 0.0
    unsolvable = Outcome.SINGULAR

    @pytest.mark.parametrize("system", SYSTEMS, ids=str)
    def test_the_solution_is_that_of_a_dense_solve(self, system: System) -> None:
        if system.relative_damping < self.least_damping:
            pytest.skip("steps in proportion to the condition")
        solution = self.solve(system.matrix, system.damping, system.rhs())
        assert solution.converged.all()
        expected = dense_solution(system.matrix, system.damping, system.rhs())
        assert relative_error(solution.x, expected) <= self.accuracy

    @pytest.mark.parametrize("system", SYSTEMS, ids=str)
    def test_more_rows_than_parameters_are_solved(self, system: System) -> None:
        if system.relative_damping < self.least_damping:
            pytest.skip("steps in proportion to the condition")
        rhs = system.rhs(system.matrix.shape[0] + 7)
        solution = self.solve(system.matrix, system.damping, rhs)
        assert solution.converged.all()
        expected = dense_solution(system.matrix, system.damping, rhs)
        assert relative_error(solution.x, expected) <= self.accuracy

    def test_one_row_is_a_block_of_one(self) -> None:
        rhs = SYSTEM.rhs(1)
        solution = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs)
        assert solution.x.shape == rhs.shape
        assert relative_error(solution.x, dense_solution(SYSTEM.matrix, SYSTEM.damping, rhs)) <= self.accuracy

    def test_duplicate_and_dependent_rows_are_solved(self) -> None:
        a, b = SYSTEM.rhs(2)
        rhs = torch.stack([a, b, a, -a, a, 1e-3 * a + b])
        solution = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs)
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(SYSTEM.matrix, SYSTEM.damping, rhs)) <= self.accuracy

    def test_zero_rows_are_exactly_zero_after_no_iterations(self) -> None:
        rhs = SYSTEM.rhs(5)
        rhs[[0, 3]] = 0
        solution = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs)
        assert (solution.x[[0, 3]] == 0).all()
        assert solution.iterations[[0, 3]].tolist() == [0, 0]
        assert solution.relative_residual[[0, 3]].tolist() == [0, 0]
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(SYSTEM.matrix, SYSTEM.damping, rhs)) <= self.accuracy

    @pytest.mark.parametrize("scale", [-1.0, 1e-30, 1e30])
    def test_scaling_a_row_scales_its_solution(self, scale: float) -> None:
        rhs = SYSTEM.rhs(3)
        scaled = rhs.clone()
        scaled[1] *= scale
        x = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs).x
        x[1] *= scale
        solution = self.solve(SYSTEM.matrix, SYSTEM.damping, scaled)
        assert solution.converged.all()
        assert relative_error(solution.x, x) <= 2 * self.accuracy

    def test_scaling_the_whole_system_leaves_the_solution(self) -> None:
        rhs = SYSTEM.rhs(3)
        x = self.solve(SYSTEM.matrix, SYSTEM.damping, rhs).x
        solution = self.solve(1e-12 * SYSTEM.matrix, 1e-12 * SYSTEM.damping, 1e-12 * rhs)
        assert solution.converged.all()
        assert relative_error(solution.x, x) <= 2 * self.accuracy

    def test_float32_stays_float32(self) -> None:
        matrix, rhs = SYSTEM.matrix.float(), SYSTEM.rhs().float()
        assert is_dataclass(self.solver)
        solver = replace(self.with_damping(SYSTEM.damping), rtol=1e-5)
        solution = solver.solve(solver.fit(self.operator(matrix)), rhs)
        assert solution.x.dtype == (torch.float32 if self.keeps_float32 else torch.float64)
        assert solution.converged.all()
        # error ≤ residual / λ_min ≤ rtol · cond · ‖x‖, with cond ≈ 100 by the damping
        assert relative_error(solution.x, dense_solution(matrix, SYSTEM.damping, rhs)) <= 1e-5 * 102

    @pytest.mark.parametrize("damping", [SYSTEM.damping, 0.0])
    def test_converged_is_what_the_outcome_says(self, damping: float) -> None:
        matrix = diagonal_with_zeros()
        rhs = torch.stack([matrix @ randn(40, seed=5), randn(40, seed=6), torch.zeros(40, dtype=torch.float64)])
        solution = self.solve(matrix, damping, rhs)
        assert solution.converged.tolist() == [outcome == "converged" for outcome in solution.outcome]
        assert solution.converged.tolist() == [True, damping > 0, True]

    @pytest.mark.parametrize("matrix", [diagonal_with_zeros(), low_rank()], ids=["diagonal", "low rank"])
    def test_a_singular_system_without_a_solution_ends_as_singular(self, matrix: Tensor) -> None:
        rhs = randn(4, matrix.shape[0], seed=7)
        solution = self.solve(matrix, 0.0, rhs)
        assert solution.outcome == (self.unsolvable,) * 4
        assert solution.x.isfinite().all()
        residual = relative_residual(matrix, 0.0, rhs, solution.x)
        assert (residual <= 1).all()
        assert (solution.relative_residual - residual).abs().max() < 1e-6

    @pytest.mark.parametrize("matrix", [diagonal_with_zeros(), low_rank()], ids=["diagonal", "low rank"])
    def test_a_singular_system_that_has_a_solution_is_solved(self, matrix: Tensor) -> None:
        rhs = randn(4, matrix.shape[0], seed=7) @ matrix
        solution = self.solve(matrix, 0.0, rhs)
        assert solution.converged.all()
        assert (relative_residual(matrix, 0.0, rhs, solution.x) < 1e-8).all()
        expected = torch.linalg.lstsq(matrix, rhs.T, driver="gelsd").solution.T
        assert relative_error(solution.x, expected) < 1e-6  # the one of least norm

    def test_a_matrix_of_zeros_is_singular_or_its_damping(self) -> None:
        matrix, rhs = torch.zeros(4, 4, dtype=torch.float64), randn(3, 4)
        assert relative_error(self.solve(matrix, 0.5, rhs).x, 2 * rhs) <= self.accuracy
        solution = self.solve(matrix, 0.0, rhs)
        assert solution.outcome == (self.unsolvable,) * 3
        assert (solution.x == 0).all()

    @pytest.mark.parametrize("damping", [2.0, 1e-2])
    def test_a_state_serves_another_damping(self, damping: float) -> None:
        rhs = SYSTEM.rhs()
        fitted = self.with_damping(SYSTEM.damping)
        other = fitted.at(damping)
        assert other == self.with_damping(damping)
        state = fitted.fit(self.operator(SYSTEM.matrix))
        x = other.solve(other.adapt(state), rhs).x
        assert relative_error(x, dense_solution(SYSTEM.matrix, damping, rhs)) <= self.accuracy
        again = fitted.solve(state, rhs).x  # nor has the state changed
        assert relative_error(again, dense_solution(SYSTEM.matrix, SYSTEM.damping, rhs)) <= self.accuracy

    def test_several_dampings_are_solved_from_one_state(self) -> None:
        rhs, dampings = SYSTEM.rhs(), [SYSTEM.damping, 2.0, 0.1]
        solver = self.with_damping(SYSTEM.damping)
        solutions = solver.solve_at(solver.fit(self.operator(SYSTEM.matrix)), rhs, dampings)
        for damping, solution in zip(dampings, solutions, strict=True):
            assert relative_error(solution.x, dense_solution(SYSTEM.matrix, damping, rhs)) <= self.accuracy
