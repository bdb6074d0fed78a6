"""What plain and block conjugate gradients promise beyond `SolverContract`: how they stop, and what they cost."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg
from torch import Tensor

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.errors import DtypeError, NonFiniteError, SettingError, ShapeError
from distinfluence.solvers import Outcome, Solution
from distinfluence.solvers.conjugate import CgState, ConjugateSolver
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import (
    P,
    dense_solution,
    diagonal_with_zeros,
    indefinite,
    randn,
    relative_error,
    relative_residual,
    spd,
    with_spectrum,
)


@dataclass(frozen=True)
class ExactDiagonal:
    """M⁻¹ = 1 / (diagonal of A + λI), with the diagonal made from the dense matrix."""

    def fit(self, operator: CurvatureOperator, damping: float) -> "Scaling":
        return Scaling(operator.dense().diagonal() + damping)


@dataclass(frozen=True)
class Scaling:
    diagonal: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        return rows / self.diagonal.to(rows.dtype)


class Identity(CurvatureOperator):
    """Its product is the very tensor that came in."""

    def _product(self, rows: Tensor) -> Tensor:
        return rows


def badly_scaled(p: int = P) -> Tensor:
    """S C S with S from 1 to 1e3 and C of condition below 3: the diagonal is all that is wrong with it."""
    scale = torch.logspace(0, 3, p, dtype=torch.float64)
    return scale[:, None] * with_spectrum(torch.linspace(1, 2, p)) * scale


class ConjugateContract(SolverContract[CgState]):
    """The solver's rtol is 1e-10: error ≤ ‖residual‖ / λ_min ≤ rtol · cond · ‖x‖ ≤ 1e-6 · ‖x‖ at condition 1e4."""

    solver: ConjugateSolver
    accuracy = 1e-6

    def run(
        self,
        matrix: Tensor,
        rhs: Tensor,
        *,
        x0: Tensor | None = None,
        damping: float = 0.0,
        rtol: float = 1e-10,
        atol: float = 0.0,
        maxiter: int | None = None,
    ) -> tuple[Solution, MatrixOperator]:
        """The solution, and the operator with its count of work."""
        operator = MatrixOperator(matrix)
        solver = replace(self.solver, damping=damping, rtol=rtol, atol=atol, maxiter=maxiter)
        return solver.solve(solver.fit(operator), rhs, x0), operator

    # ---- how a row ends

    @pytest.mark.parametrize("maxiter", [1, 2, 5])
    def test_a_solve_that_is_stopped_early_says_so(self, maxiter: int) -> None:
        solution, operator = self.run(spd(), randn(3, P), maxiter=maxiter)
        assert not solution.converged.any()
        assert solution.outcome == (Outcome.MAXITER,) * 3
        assert solution.iterations.tolist() == [maxiter] * 3
        assert operator.work.passes == maxiter + 1
        assert (solution.relative_residual > 1e-10).all()

    def test_rows_that_converge_before_the_last_iteration_keep_that(self) -> None:
        matrix = torch.diag(torch.logspace(0, -4, P, dtype=torch.float64))
        rhs = randn(2, P)
        rhs[0] = 0
        rhs[0, 0] = 1.0  # an eigenvector
        solution, _ = self.run(matrix, rhs, maxiter=3)
        assert solution.outcome == (Outcome.CONVERGED, Outcome.MAXITER)
        assert solution.iterations.tolist() == [1, 3]

    @pytest.mark.parametrize("damping", [0.0, 0.05])
    def test_negative_curvature_is_reported_with_its_quotient(self, damping: float) -> None:
        matrix, rhs = indefinite(), randn(6, P)
        solution, operator = self.run(matrix, rhs, damping=damping)
        assert set(solution.outcome) == {Outcome.NEGATIVE_CURVATURE}
        assert not solution.converged.any()
        assert (solution.curvature <= 0).all()
        assert (solution.curvature >= torch.linalg.eigvalsh(matrix)[0] + damping - 1e-12).all()
        assert (relative_residual(matrix, damping, rhs, solution.x) <= 1).all()
        assert operator.work.passes <= P + 1  # it does not wander

    def test_a_negative_definite_matrix_ends_at_the_first_step(self) -> None:
        solution, operator = self.run(-spd(), randn(3, P))
        assert solution.outcome == (Outcome.NEGATIVE_CURVATURE,) * 3
        assert solution.iterations.tolist() == [1, 1, 1]
        assert operator.work.passes == 2
        assert (solution.x == 0).all()

    def test_damping_that_makes_it_definite_ends_the_complaint(self) -> None:
        rhs = randn(3, P)
        solution, _ = self.run(indefinite(), rhs, damping=0.6)
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(indefinite(), 0.6, rhs)) <= self.accuracy

    def test_the_curvature_seen_lies_within_the_spectrum(self) -> None:
        solution, _ = self.run(spd(), randn(3, P), damping=0.5)
        assert (solution.curvature >= 0.5).all()
        assert (solution.curvature <= 1.5 + 1e-12).all()

    def test_rows_without_work_have_seen_no_curvature(self) -> None:
        solution, _ = self.run(spd(), torch.zeros(2, P, dtype=torch.float64))
        assert solution.curvature.isnan().all()

    @pytest.mark.parametrize("cond", [1e2, 1e4])
    def test_float32_asked_for_more_than_it_has_never_says_converged(self, cond: float) -> None:
        matrix, rhs = spd(cond=cond).float(), randn(4, P).float()
        solution, _ = self.run(matrix, rhs, rtol=1e-12)
        assert set(solution.outcome) <= {Outcome.STAGNATED, Outcome.MAXITER}
        assert not solution.converged.any()
        # still as good as float32 allows: the attainable residual is eps · cond
        assert (relative_residual(matrix, 0.0, rhs, solution.x) <= 10 * 1.2e-7 * cond).all()

    def test_float32_that_cannot_get_any_further_stops_before_its_budget_is_spent(self) -> None:
        matrix, rhs = spd(200, cond=1e4).float(), randn(4, 200).float()
        solution, operator = self.run(matrix, rhs, rtol=1e-7)
        assert solution.outcome == (Outcome.STAGNATED,) * 4
        residual = relative_residual(matrix, 0.0, rhs, solution.x)
        assert (residual <= 10 * 1.2e-7 * 1e4).all()  # what is attainable: eps · cond
        assert operator.work.passes <= 0.65 * 2000  # of 10·p

    @pytest.mark.parametrize("name", ["diagonal", "clustered"])
    def test_singular_systems_never_make_the_residual_larger(self, name: str) -> None:
        zeros = torch.zeros(P // 2, dtype=torch.float64)
        spectrum = torch.cat([zeros, torch.logspace(0, -6, P - P // 2, dtype=torch.float64)])
        matrix = diagonal_with_zeros() if name == "diagonal" else with_spectrum(spectrum)
        rhs = randn(5, P)
        solution, _ = self.run(matrix, rhs)
        assert Outcome.CONVERGED not in solution.outcome
        assert (relative_residual(matrix, 0.0, rhs, solution.x) <= 1).all()

    def test_residuals_that_do_not_fall_for_hundreds_of_steps_are_no_reason_to_give_up(self) -> None:
        matrix, rhs = spd(200, cond=1e6), randn(2, 200)  # CG lowers the energy in each step, not the residual
        solution, operator = self.run(matrix, rhs, rtol=1e-7, maxiter=10_000)
        assert solution.converged.all()
        # error ≤ residual / λ_min ≤ rtol · cond · ‖x‖
        assert relative_error(solution.x, dense_solution(matrix, 0.0, rhs)) <= 1e-7 * 1e6
        # looking at the true residual now and then is all that a plateau costs
        assert operator.work.passes <= 1.02 * int(solution.iterations.max()) + 2

    def test_a_row_that_runs_out_of_steps_keeps_its_iterate_though_its_residual_rose(self) -> None:
        matrix, rhs = spd(200, cond=1e6), randn(1, 200)
        for steps in range(3, 40):
            solution, _ = self.run(matrix, rhs, rtol=1e-7, maxiter=steps)
            error = dense_solution(matrix, 0.0, rhs) - solution.x
            nothing = dense_solution(matrix, 0.0, rhs)
            assert float(error @ matrix @ error.T) < float(nothing @ matrix @ nothing.T)  # each step lowers the energy
            if float(solution.relative_residual) > 1:
                return
        raise AssertionError("no residual rose: take a worse matrix")

    def test_easy_rows_do_not_end_a_hard_one(self) -> None:
        matrix = spd(400, cond=1e5)
        easy = torch.linalg.eigh(matrix).eigenvectors[:, -9:].T  # each converges in a step or few
        solution, _ = self.run(matrix, torch.cat([easy, randn(1, 400)]), rtol=1e-8)
        assert solution.converged.all()

    def test_a_matrix_that_is_not_finite_is_no_crash(self) -> None:
        matrix, rhs = spd(), randn(3, P)
        matrix[2, 3] = matrix[3, 2] = torch.nan
        solution, _ = self.run(matrix, rhs)
        assert not solution.converged.any()
        assert solution.x.isfinite().all()

    @pytest.mark.parametrize("start", [None, randn(3, P, seed=8)], ids=["from zero", "warm"])
    def test_an_operator_may_return_the_rows_it_was_given(self, start: Tensor | None) -> None:
        rhs = randn(3, P)
        operator = Identity(P, torch.float64, torch.device("cpu"))
        solver = replace(self.solver, damping=1.0)
        solution = solver.solve(solver.fit(operator), rhs, start)
        assert solution.converged.all()
        assert relative_error(solution.x, rhs / 2) <= self.accuracy

    # ---- what converged means

    @pytest.mark.parametrize(
        ("rtol", "atol"), [(1e-10, 0.0), (1e-4, 0.0), (1e-10, 1e-2), (0.0, 1e-5), (1e-3, 1e-1), (1e-2, 0.12)]
    )
    def test_tolerances_mean_what_they_mean_in_scipy(self, rtol: float, atol: float) -> None:
        matrix, b = spd(200, cond=10), randn(200)  # so good that rounding moves no step
        steps: list[object] = []
        x, info = cg(matrix.numpy(), b.numpy(), rtol=rtol, atol=atol, callback=steps.append)
        assert info == 0
        solution, _ = self.run(matrix, b[None], rtol=rtol, atol=atol)
        assert solution.iterations.tolist() == [len(steps)]
        norm = float(b.norm())
        assert float(solution.relative_residual) * norm <= max(rtol * norm, atol)
        assert np.linalg.norm(solution.x[0].numpy() - x) <= 1e-8 * np.linalg.norm(x)

    def test_each_row_has_its_own_threshold(self) -> None:
        rhs = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None] * randn(3, P)
        solution, _ = self.run(spd(), rhs)
        assert solution.converged.all()
        assert (relative_residual(spd(), 0.0, rhs, solution.x) <= 1e-10 * (1 + 1e-3)).all()

    def test_rows_below_the_absolute_tolerance_need_nothing(self) -> None:
        rhs = torch.stack([1e-9 * randn(P), randn(P)])
        solution, _ = self.run(spd(), rhs, atol=1e-6)
        assert solution.converged.all()
        assert int(solution.iterations[0]) == 0
        assert (solution.x[0] == 0).all()

    # ---- warm starts

    def test_an_exact_start_costs_one_pass_and_no_iterations(self) -> None:
        rhs = randn(3, P)
        x0 = dense_solution(spd(), 0.1, rhs)
        before = x0.clone()
        solution, operator = self.run(spd(), rhs, x0=x0, damping=0.1)
        assert solution.iterations.tolist() == [0, 0, 0]
        assert operator.work.passes == 1
        assert torch.equal(solution.x, x0)
        assert torch.equal(x0, before)

    def test_a_close_start_saves_passes_and_is_not_modified(self) -> None:
        rhs = randn(3, P)
        x0 = dense_solution(spd(), 1e-3, rhs) * (1 + 1e-6 * randn(3, P, seed=9))
        before = x0.clone()
        warm, warm_operator = self.run(spd(), rhs, x0=x0, damping=1e-3)
        _, cold_operator = self.run(spd(), rhs, damping=1e-3)
        assert warm_operator.work.passes < cold_operator.work.passes
        assert relative_error(warm.x, dense_solution(spd(), 1e-3, rhs)) <= self.accuracy
        assert torch.equal(x0, before)

    def test_a_zero_row_is_zero_wherever_it_starts(self) -> None:
        rhs = randn(3, P)
        rhs[1] = 0
        solution, _ = self.run(spd(), rhs, x0=randn(3, P, seed=8), damping=0.1)
        assert (solution.x[1] == 0).all()
        assert solution.converged.all()
        assert int(solution.iterations[1]) == 0
        assert float(solution.relative_residual[1]) == 0

    def test_a_start_that_does_not_fit_is_refused_by_name(self) -> None:
        rhs = randn(3, P)
        for shape in [(P,), (3, P - 1), (1, P), (4, P)]:
            with pytest.raises(ShapeError, match=r"`x0` must be"):
                self.run(spd(), rhs, x0=torch.zeros(shape, dtype=torch.float64))
        with pytest.raises(DtypeError, match=r"`x0` must be torch.float64"):
            self.run(spd(), rhs, x0=torch.zeros(3, P))
        with pytest.raises(NonFiniteError, match=r"`x0` must be finite.*rows \[0, 1, 2\]"):
            self.run(spd(), rhs, x0=torch.full((3, P), torch.nan, dtype=torch.float64))

    # ---- preconditioners

    def test_a_preconditioner_saves_passes(self) -> None:
        matrix, rhs = badly_scaled(), randn(3, P)
        passes = {}
        for preconditioner in (None, ExactDiagonal()):
            operator = MatrixOperator(matrix)
            solver = replace(self.solver, damping=0.1, preconditioner=preconditioner)
            state = solver.fit(operator)
            before = operator.work.passes
            solution = solver.solve(state, rhs)
            passes[preconditioner] = operator.work.passes - before
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(matrix, 0.1, rhs)) <= 1e-10 * 4e6
        assert passes[ExactDiagonal()] <= passes[None] / 2

    @pytest.mark.parametrize("rtol", [1e-2, 1e-6, 1e-10])
    def test_with_a_preconditioner_the_tolerance_is_that_of_the_true_residual(self, rtol: float) -> None:
        matrix, rhs = badly_scaled(), randn(3, P)
        solver = replace(self.solver, damping=0.1, rtol=rtol, preconditioner=ExactDiagonal())
        solution = solver.solve(solver.fit(MatrixOperator(matrix)), rhs)
        assert solution.converged.all()
        residual = relative_residual(matrix, 0.1, rhs, solution.x)
        assert (residual <= rtol * (1 + 1e-3)).all()
        assert (solution.relative_residual - residual).abs().max() <= 1e-12

    def test_an_exact_preconditioner_takes_one_step(self) -> None:
        rhs = randn(3, P)
        diagonal = torch.diag(torch.logspace(0, -4, P, dtype=torch.float64))
        solver = replace(self.solver, damping=1e-5, preconditioner=ExactDiagonal())
        solution = solver.solve(solver.fit(MatrixOperator(diagonal)), rhs)
        assert solution.converged.all()
        assert solution.iterations.tolist() == [1, 1, 1]

    def test_a_preconditioner_takes_zero_rows_and_duplicates(self) -> None:
        rhs = randn(4, P)
        rhs[1], rhs[2] = rhs[0], 0
        solver = replace(self.solver, damping=0.1, preconditioner=ExactDiagonal())
        solution = solver.solve(solver.fit(MatrixOperator(spd())), rhs)
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(spd(), 0.1, rhs)) <= self.accuracy

    # ---- what it costs

    def test_rows_of_zeros_cost_no_pass(self) -> None:
        _, operator = self.run(spd(), torch.zeros(4, P, dtype=torch.float64))
        assert operator.work.passes == 0

    def test_fitting_costs_no_pass(self) -> None:
        operator = MatrixOperator(spd())
        replace(self.solver, damping=0.1).fit(operator)
        assert operator.work.passes == 0

    def test_there_is_one_pass_for_each_iteration_and_one_for_the_true_residual(self) -> None:
        solution, operator = self.run(spd(cond=100), randn(5, P), rtol=1e-6)
        assert solution.converged.all()
        assert operator.work.passes == int(solution.iterations.max()) + 1

    def test_one_row_needs_no_more_steps_than_there_are_distinct_eigenvalues(self) -> None:
        matrix = with_spectrum(torch.tensor([1.0, 2.0, 5.0]).repeat(4))
        solution, _ = self.run(matrix, randn(1, 12))
        assert solution.converged.all()
        assert int(solution.iterations) <= 3

    def test_iterations_by_default_are_bounded_by_ten_for_each_parameter(self) -> None:
        matrix = with_spectrum(torch.logspace(0, -15, 6, dtype=torch.float64))
        solution, operator = self.run(matrix, randn(1, 6), rtol=1e-15)
        assert int(solution.iterations) <= 60
        assert operator.work.passes <= 2 * 60

    # ---- hyperparameters

    @pytest.mark.parametrize("atol", [-1e-7, float("inf"), float("nan"), "0", True])
    def test_an_absolute_tolerance_below_zero_or_infinite_is_refused(self, atol: float) -> None:
        with pytest.raises(SettingError, match=r"`atol` must be a number from 0 to below inf, got"):
            replace(self.solver, atol=atol)

    def test_two_tolerances_of_zero_are_refused(self) -> None:
        with pytest.raises(SettingError, match=r"`rtol` and `atol` must not both be 0"):
            replace(self.solver, rtol=0.0, atol=0.0)

    @pytest.mark.parametrize("maxiter", [0, -1, 2.5, "10", True])
    def test_a_number_of_iterations_that_is_none_is_refused(self, maxiter: int) -> None:
        with pytest.raises(SettingError, match=r"`maxiter` must be a whole number ≥ 1 or None, got"):
            replace(self.solver, maxiter=maxiter)
