"""Direct: the contract, and what a dense factorisation can do that others cannot."""

import pytest
import torch

from distinfluence.curvature import MatrixOperator
from distinfluence.errors import NonFiniteError
from distinfluence.solvers import Direct, Outcome
from distinfluence.solvers.direct import Factorisation
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import (
    SYSTEM,
    P,
    dense_solution,
    indefinite,
    low_rank,
    randn,
    relative_error,
    spd,
    with_spectrum,
)


class TestDirect(SolverContract[Factorisation]):
    solver = Direct(damping=0.0)
    accuracy = 1e-8

    def test_a_positive_definite_matrix_says_so(self) -> None:
        state = Direct(SYSTEM.damping).fit(MatrixOperator(SYSTEM.matrix))
        assert state.positive_definite

    @pytest.mark.parametrize("damping", [0.0, 0.05])
    def test_an_indefinite_matrix_is_solved_and_says_so(self, damping: float) -> None:
        matrix, rhs = indefinite(), randn(4, P)
        state = Direct(damping).fit(MatrixOperator(matrix))
        assert not state.positive_definite
        solution = Direct(damping).solve(state, rhs)
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(matrix, damping, rhs)) <= self.accuracy
        smallest = float(torch.linalg.eigvalsh(matrix)[0]) + damping
        assert torch.allclose(solution.curvature, torch.full((4,), smallest, dtype=torch.float64))

    def test_the_indefinite_factorisation_survives_being_stored(self) -> None:
        matrix, rhs = indefinite(), randn(4, P)
        solver = Direct(0.05)
        state = solver.fit(MatrixOperator(matrix))
        restored = solver.restore(MatrixOperator(matrix), solver.state_arrays(state))
        assert not restored.positive_definite
        assert torch.equal(solver.solve(restored, rhs).x, solver.solve(state, rhs).x)

    def test_an_indefinite_matrix_is_never_given_a_positive_curvature(self) -> None:
        # a cluster of small eigenvalues around zero, which Lanczos for the ends of the spectrum does not resolve
        values = torch.cat([torch.linspace(-1.05e-4, 1.05e-4, 199), torch.ones(1)]).double()
        state = Direct(1e-4).fit(MatrixOperator(with_spectrum(values)))
        assert not state.positive_definite
        assert state.smallest_eigenvalue <= -1e-4
        assert (Direct(1e-4).solve(state, randn(2, 200)).curvature <= 0).all()

    def test_a_matrix_is_as_it_was_where_its_factorisation_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*arguments: object) -> object:
            raise torch.OutOfMemoryError("no room")

        state = Direct(0.05).fit(MatrixOperator(indefinite()))
        before = state.matrix.clone()
        for name in ("lu_factor_ex", "cholesky_ex"):
            monkeypatch.setattr(torch.linalg, name, full)
            with pytest.raises(torch.OutOfMemoryError):
                Direct(0.1).adapt(state)
            assert torch.equal(state.matrix, before)

    def test_only_a_singular_matrix_is_decomposed_by_eigenvalues(self) -> None:
        matrix, rhs = indefinite(), randn(4, P)
        values, vectors = torch.linalg.eigh(matrix)
        values[P // 2] = 0.0
        singular = vectors @ (values[:, None] * vectors.T)
        regular, zero = (Direct(0.0).fit(MatrixOperator(m)) for m in (matrix, singular))
        assert (regular.pivots.numel(), regular.eigenvalues.numel()) == (P, 0)
        assert (zero.pivots.numel(), zero.eigenvalues.numel()) == (0, P)
        least_norm = torch.linalg.lstsq(singular, rhs.T, driver="gelsd").solution.T
        assert relative_error(Direct(0.0).solve(zero, rhs).x, least_norm) <= self.accuracy

    def test_an_indefinite_matrix_with_another_damping_is_factorised_anew(self) -> None:
        matrix, rhs = indefinite(), randn(4, P)
        state = Direct(0.05).fit(MatrixOperator(matrix))
        for damping in (0.1, 10.0 + float(torch.linalg.eigvalsh(matrix)[0].abs())):
            adapted = Direct(damping).adapt(state)
            assert adapted.positive_definite == (damping > 10)
            assert relative_error(Direct(damping).solve(adapted, rhs).x, dense_solution(matrix, damping, rhs)) < 1e-8

    def test_restoring_and_solving_take_no_pass(self) -> None:
        operator = MatrixOperator(SYSTEM.matrix)
        solver = Direct(SYSTEM.damping)
        arrays = solver.state_arrays(solver.fit(MatrixOperator(SYSTEM.matrix)))
        x = solver.solve(solver.restore(operator, arrays), SYSTEM.rhs()).x
        assert operator.work.passes == 0
        assert relative_error(x, dense_solution(SYSTEM.matrix, SYSTEM.damping, SYSTEM.rhs())) <= self.accuracy

    def test_fitting_takes_one_product_for_each_parameter_and_solving_none(self) -> None:
        operator = MatrixOperator(SYSTEM.matrix)
        solver = Direct(SYSTEM.damping)
        state = solver.fit(operator)
        assert (operator.work.passes, operator.work.rows) == (1, P)
        solver.solve(state, SYSTEM.rhs(3))
        assert (operator.work.passes, operator.work.rows) == (1, P)

    def test_no_iterations_are_counted(self) -> None:
        assert self.solve(SYSTEM.matrix, SYSTEM.damping, SYSTEM.rhs(3)).iterations.tolist() == [0, 0, 0]

    @pytest.mark.parametrize("p", [5, 40, 150])
    def test_a_rank_that_rounding_hides_is_not_divided_by(self, p: int) -> None:
        # the smallest pivots are ± rounding: whether Cholesky fails is chance, what comes out must not be
        matrix, rhs = low_rank(p, n=p - 1), randn(4, p)
        state = Direct(0.0).fit(MatrixOperator(matrix))
        assert not state.positive_definite
        solution = Direct(0.0).solve(state, rhs)
        assert solution.outcome == (Outcome.SINGULAR,) * 4
        assert (solution.relative_residual <= 1).all()

    def test_a_matrix_of_one_entry_is_singular_only_at_zero(self) -> None:
        for entry in (1e-200, 1.0, 1e200):
            matrix = torch.tensor([[entry]], dtype=torch.float64)
            assert Direct(0.0).fit(MatrixOperator(matrix)).positive_definite
        assert not Direct(0.0).fit(MatrixOperator(torch.zeros(1, 1))).positive_definite

    def test_float32_that_cannot_hold_the_solution_is_not_called_converged(self) -> None:
        matrix = with_spectrum(torch.logspace(0, -9, P)).float()
        solution = self.solve(matrix, 1e-9, randn(4, P).float())
        assert not solution.converged[solution.relative_residual > 0.1].any()

    def test_ill_conditioned_float32_is_solved_to_its_rounding(self) -> None:
        matrix, rhs = spd(cond=1e4).float(), randn(4, P).float()
        assert self.solve(matrix, 0.0, rhs).converged.all()

    @pytest.mark.parametrize(("cond", "solved"), [(1e8, True), (1e13, False)])
    def test_a_float64_row_that_misses_its_tolerance_is_not_called_converged(self, cond: float, solved: bool) -> None:
        solution = self.solve(spd(cond=cond), 0.0, randn(4, P))
        assert ((solution.relative_residual <= 1e-6) == solved).all()
        assert (solution.converged == solved).all()

    def test_a_matrix_that_is_not_finite_is_refused(self) -> None:
        matrix = spd()
        matrix[2, 3] = matrix[3, 2] = torch.nan
        with pytest.raises(
            NonFiniteError, match=r"`operator` must be finite, got NaN or infinity in \d+ of 1600 entries"
        ):
            Direct(0.1).fit(MatrixOperator(matrix))
