"""NystroemSketch: the contract at full rank, and what a sketch of lower rank promises."""

import itertools
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import MatrixOperator
from distinfluence.errors import NonFiniteError, SettingError
from distinfluence.solvers import Arnoldi, InverseHarmonicMean, NystroemSketch, Outcome
from distinfluence.solvers.nystroem import (
    LowRank,
    NystroemState,
    approximation_error,
    extend,
    low_rank,
    nystroem,
    sketched,
)
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import (
    SYSTEM,
    P,
    dense_solution,
    indefinite,
    randn,
    relative_error,
    spd,
    with_spectrum,
)
from distinfluence.testing.systems import low_rank as of_low_rank

EPS = torch.finfo(torch.float64).eps


def falling(p: int = 120) -> Tensor:
    """Eigenvalues 1, 0.8, 0.64, …: the case that sketches are for."""
    return with_spectrum(0.8 ** torch.arange(p))


def barely_indefinite(p: int = 200) -> Tensor:
    """As a network's Hessian: few large eigenvalues, many small ones of either sign."""
    bulk = torch.linspace(-0.02, 0.03, p - 10, dtype=torch.float64)
    return with_spectrum(torch.cat([torch.logspace(0, -1, 10, dtype=torch.float64), bulk]))


def psd(matrix: Tensor) -> MatrixOperator:
    return MatrixOperator(matrix, positive_semidefinite=True)


def as_matrix(found: LowRank) -> Tensor:
    basis = found.basis.double()
    return (basis.T * found.values) @ basis


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


class TestNystroemSketch(SolverContract[NystroemState]):
    """At full rank the sketch is the matrix, up to the rounding of float64 times its condition."""

    solver = NystroemSketch(damping=0.0, rank=P, residual_rows=64)
    accuracy = 1e-8

    @pytest.mark.parametrize("semidefinite", [True, False])
    def test_fitting_takes_one_pass_or_two_and_solving_one(self, semidefinite: bool) -> None:
        operator = MatrixOperator(SYSTEM.matrix, semidefinite)
        solver = NystroemSketch(SYSTEM.damping, rank=7, residual_rows=99)
        state = solver.fit(operator)
        passes = 1 if semidefinite else 2
        assert (operator.work.passes, operator.work.rows) == (passes, 7 * passes)
        solver.solve(state, SYSTEM.rhs(3))
        assert (operator.work.passes, operator.work.rows) == (passes + 1, 7 * passes + 3)

    def test_a_rank_above_the_size_is_the_size(self) -> None:
        operator = psd(SYSTEM.matrix)
        state = NystroemSketch(SYSTEM.damping, rank=10 * P).fit(operator)
        assert state.found.basis.shape == (P, P)
        assert operator.work.rows == P

    def test_restoring_and_another_damping_take_no_pass(self) -> None:
        operator = psd(SYSTEM.matrix)
        solver = NystroemSketch(SYSTEM.damping, rank=P, residual_rows=99)
        arrays = solver.state_arrays(solver.fit(psd(SYSTEM.matrix)))
        other = solver.at(3 * SYSTEM.damping)
        state = other.adapt(solver.restore(operator, arrays))
        assert operator.work.passes == 0
        expected = dense_solution(SYSTEM.matrix, 3 * SYSTEM.damping, SYSTEM.rhs())
        assert relative_error(other.solve(state, SYSTEM.rhs()).x, expected) <= self.accuracy

    def test_many_dampings_take_one_fit_and_a_pass_each_for_their_residuals(self) -> None:
        operator = psd(SYSTEM.matrix)
        solver = NystroemSketch(SYSTEM.damping, rank=P, residual_rows=99)
        state, dampings = solver.fit(operator), [1e-3, 1e-2, 1e-1]
        solutions = solver.solve_at(state, SYSTEM.rhs(), dampings)
        assert operator.work.passes == 1 + 3
        for damping, solution in zip(dampings, solutions, strict=True):
            expected = dense_solution(SYSTEM.matrix, damping, SYSTEM.rhs())
            assert relative_error(solution.x, expected) <= self.accuracy

    @pytest.mark.parametrize("rank", [1, 5, 20, 60])
    def test_the_solution_is_the_inverse_of_the_sketch_and_not_its_misprint(self, rank: int) -> None:
        # literally, U (Λ + λ) Uᵀ x + (x − U Uᵀ x)/λ would be far off
        matrix, rhs, damping = falling(), randn(4, 120), 0.05
        solver = NystroemSketch(damping, rank=rank, residual_rows=99)
        state = solver.fit(psd(matrix))
        expected = dense_solution(as_matrix(state.found), damping, rhs)
        solution = solver.solve(state, rhs)
        # rounding of U's orthogonality and of Λ, over λ: about p·eps/λ, 5e-13
        assert relative_error(solution.x, expected) <= 1e-11
        assert (solution.relative_residual > 1e-6).all()
        assert solution.outcome == (Outcome.APPROXIMATE,) * 4
        assert not solution.converged.any()

    def test_the_error_of_the_solution_is_bounded_by_that_of_the_sketch(self) -> None:
        # (Â + λ)⁻¹ − (A + λ)⁻¹ = (Â + λ)⁻¹(A − Â)(A + λ)⁻¹, so the error relative to the exact row is ≤ ‖A − Â‖/λ
        matrix, rhs, damping = falling(), randn(6, 120), 0.05
        for rank in (5, 15, 45):
            solver = NystroemSketch(damping, rank=rank, residual_rows=99)
            state = solver.fit(psd(matrix))
            bound = norm(matrix - as_matrix(state.found)) / damping
            x = solver.solve(state, rhs).x
            assert relative_error(x, dense_solution(matrix, damping, rhs)) <= bound * (1 + 1e-9)
        assert bound < 0.1  # at rank 45: 0.8⁴⁵ = 4e-5 is a thousandth of λ, and the sketch misses some times that

    def test_the_estimate_of_the_error_goes_into_the_report_for_its_passes(self) -> None:
        operator = psd(falling())
        state = NystroemSketch(0.05, rank=10, estimate_error=6).fit(operator)
        assert operator.work.passes == 1 + 6
        error = norm(falling() - as_matrix(state.found))
        estimate = float(state.details["error"])
        # power iterations come from below; the seed decides how close, but six with four rows do not lose a third
        assert 0.67 * error <= estimate <= error * (1 + 1e-9)
        assert any(f"{estimate:.3g} off the matrix" in remark for remark in state.remarks)
        assert "error" not in NystroemSketch(0.05).fit(psd(falling())).details

    def test_without_damping_the_sketch_is_inverted_on_its_range_and_says_so(self) -> None:
        matrix, rhs = falling(), randn(3, 120)
        solver = NystroemSketch(0.0, rank=12, residual_rows=99)
        state = solver.fit(psd(matrix))
        solution = solver.solve(state, rhs)
        expected = (torch.linalg.pinv(as_matrix(state.found), rtol=1e-10, hermitian=True) @ rhs.T).T
        assert relative_error(solution.x, expected) <= 1e-8
        assert any("on its own range" in remark for remark in solution.remarks)
        assert solver.at(0.1).solve(state, rhs).remarks == ()

    def test_a_matrix_of_lower_rank_than_the_sketch_is_exact(self) -> None:
        matrix, rhs = of_low_rank(), randn(4, P)
        solution = NystroemSketch(0.01, rank=12, residual_rows=99).solve(
            NystroemSketch(0.01, rank=12, residual_rows=99).fit(psd(matrix)), rhs
        )
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(matrix, 0.01, rhs)) <= self.accuracy

    @pytest.mark.parametrize("rank", [20, 60, 100, 140, 200])
    def test_a_sketch_of_an_indefinite_matrix_has_no_eigenvalue_above_its_norm(self, rank: int) -> None:
        # by the usual formula the largest eigenvalue grows without bound as the core becomes indefinite, or its shift
        # is added twice: 7.6e12 has been seen
        found = nystroem(MatrixOperator(barely_indefinite()), rank)
        assert float(found.values[0]) <= 1 + 1e-12
        assert (found.values >= 0).all()
        if rank == 200:  # all is seen: the positive part of A
            values, vectors = torch.linalg.eigh(barely_indefinite())
            positive = (vectors * values.clamp_min(0)) @ vectors.T
            assert norm(as_matrix(found) - positive) <= 1e-10
            assert found.clipped == pytest.approx(-0.02, rel=1e-9)

    def test_an_indefinite_matrix_is_clipped_and_says_so(self) -> None:
        matrix = indefinite()
        state = NystroemSketch(0.1, rank=P).fit(MatrixOperator(matrix))
        assert state.positive_definite is False
        (remark,) = state.remarks
        assert "-0.5" in remark
        assert 'Use second_order_mode="ggn"' in remark
        rhs = randn(3, P)
        solution = NystroemSketch(0.1, rank=P).solve(state, rhs)
        values, vectors = torch.linalg.eigh(matrix)
        positive = (vectors * values.clamp_min(0)) @ vectors.T
        assert relative_error(solution.x, dense_solution(positive, 0.1, rhs)) <= 1e-8
        assert not solution.converged.any()  # the residual is that of A, not of its positive part

    def test_what_is_known_of_definiteness(self) -> None:
        assert NystroemSketch(0.1, rank=5).fit(psd(spd())).positive_definite is True
        assert NystroemSketch(0.0, rank=5).fit(psd(spd())).positive_definite is None
        assert NystroemSketch(0.1, rank=5).fit(MatrixOperator(spd())).positive_definite is None
        assert NystroemSketch(0.6, rank=P).fit(MatrixOperator(indefinite())).positive_definite is None

    def test_the_fit_report_has_the_eigenvalues(self) -> None:
        state = NystroemSketch(0.1, rank=P).fit(psd(spd()))
        expected = torch.linalg.eigvalsh(spd()).flip(0)
        torch.testing.assert_close(state.details["eigenvalues"], expected, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize(
        ("name", "value"), [("rank", 0), ("rank", 2.0), ("seed", -1), ("estimate_error", -1), ("rank", True)]
    )
    def test_settings_are_checked(self, name: str, value: float) -> None:
        with pytest.raises(SettingError, match=f"`{name}` must be"):
            replace(self.solver, **{name: value})

    def test_a_matrix_that_is_not_finite_is_refused(self) -> None:
        matrix = spd()
        matrix[2, 3] = matrix[3, 2] = torch.nan
        with pytest.raises(NonFiniteError, match="`operator` must be finite"):
            NystroemSketch(0.1).fit(MatrixOperator(matrix))


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_the_sketch_is_what_the_formula_says(rank: int) -> None:
    """Â = AΩᵀ(ΩAΩᵀ)⁻¹ΩA from the same Ω, and below A."""
    matrix, operator = falling(), psd(falling())
    omega = sketched(operator, rank).omega
    expected = matrix @ omega.T @ torch.linalg.solve(omega @ matrix @ omega.T, omega @ matrix)
    found = nystroem(operator, rank)
    # the core's condition at rank 40 is about 0.8⁻⁴⁰ = 1e4, and √p·eps·1e4 is 2e-11
    assert norm(as_matrix(found) - expected) <= 1e-10
    assert float(torch.linalg.eigvalsh(matrix - as_matrix(found))[0]) >= -1e-12


@pytest.mark.parametrize("semidefinite", [True, False])
@pytest.mark.parametrize("rank", [1, 8, 40, 120])
def test_rows_are_orthonormal_and_eigenvalues_fall_to_zero_at_least(rank: int, semidefinite: bool) -> None:
    found = nystroem(MatrixOperator(falling(), semidefinite), rank)
    assert (found.values[:-1] >= found.values[1:]).all()
    assert (found.values >= 0).all()
    basis = found.basis
    assert float((basis @ basis.T - torch.eye(rank)).abs().max()) <= 1e-13
    assert found.values.dtype == torch.float64
    if rank == 120:
        assert norm(as_matrix(found) - falling()) <= 100 * EPS * 120**0.5


def test_the_second_pass_makes_a_better_sketch_than_the_first() -> None:
    """Rayleigh quotients on the range of AΩ lie between the Nyström values and the eigenvalues."""
    matrix = falling()
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    for rank in (4, 10, 30):
        once, twice = nystroem(psd(matrix), rank).values, nystroem(MatrixOperator(matrix), rank).values
        assert (once <= twice + 1e-14).all()
        assert (twice <= exact[:rank] + 1e-14).all()


def test_the_shift_is_taken_off_once() -> None:
    """In float32 the shift is 1e-6 of the norm: a matrix that is a multiple of one shows it."""
    found = nystroem(psd(torch.eye(50)), 20)
    assert found.shift > 0
    # what rounding of the products leaves is of the shift's size; shifting twice would leave it in every eigenvalue
    assert float((found.values - 1).mean().abs()) <= 0.2 * found.shift
    assert nystroem(psd(1e-20 * torch.eye(50, dtype=torch.float64)), 20).values[0] == pytest.approx(1e-20, rel=1e-12)


def test_float32_keeps_its_dtype_and_its_rounding() -> None:
    matrix = falling().float()
    found = nystroem(psd(matrix), 120)
    assert found.basis.dtype == torch.float32
    assert found.values.dtype == torch.float64
    # products are off by √p·eps·‖A‖ = 1.3e-6, and so is what is cut off
    assert norm(matrix.double() - as_matrix(found)) <= 10 * 1.3e-6


def test_a_larger_sketch_keeps_the_old_rows_and_multiplies_only_the_new_ones() -> None:
    operator = psd(falling())
    small = sketched(operator, 10)
    large = extend(operator, small, 25)
    assert (operator.work.passes, operator.work.rows) == (2, 25)
    assert torch.equal(large.omega[:10], small.omega)
    assert torch.equal(large.product[:10], small.product)
    torch.testing.assert_close(large.omega @ large.omega.T, torch.eye(25).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(large.product, large.omega @ falling(), rtol=0, atol=1e-14)
    assert extend(operator, large, 25) is large
    assert extend(operator, large, 10) is large
    assert extend(operator, large, 1000).omega.shape == (120, 120)
    errors = [norm(falling() - as_matrix(low_rank(operator, sketch))) for sketch in (small, large)]
    # the rank-25 sketch is below A and above the rank-10 one; with eigenvalues 0.8ⁱ the errors are 0.8¹⁵ = 0.04 apart
    assert errors[1] < 0.2 * errors[0]


def test_the_power_estimate_serves_an_adaptive_rank() -> None:
    operator = psd(falling())
    sketch, looks = sketched(operator, 5), 1
    while approximation_error(operator, found := low_rank(operator, sketch), passes=4) > 1e-3:
        sketch, looks = extend(operator, sketch, 2 * sketch.omega.shape[0]), looks + 1
    assert 40 <= sketch.omega.shape[0] < 120  # no sketch of rank 20 can do: the best one misses 0.8²⁰ = 1e-2
    assert norm(falling() - as_matrix(found)) < 2e-3
    assert operator.work.passes == looks * (1 + 4)
    assert operator.work.rows == sketch.omega.shape[0] + looks * 4 * 4


def test_the_same_seed_gives_the_same_sketch_and_another_another() -> None:
    first, again, other = (nystroem(psd(falling()), 6, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.basis, again.basis)
    assert not torch.equal(first.values, other.values)


def test_a_matrix_of_zeros_has_a_sketch_of_zeros() -> None:
    for operator in (psd(torch.zeros(9, 9)), MatrixOperator(torch.zeros(9, 9))):
        found = nystroem(operator, 4)
        assert not found.values.any()
        assert found.basis.isfinite().all()
        assert approximation_error(operator, found) == 0


def test_wide_rows_are_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nystroem(psd(falling()), 9)
    monkeypatch.setattr(sys.modules[nystroem.__module__], "COLUMNS", 7)
    torch.testing.assert_close(nystroem(psd(falling()), 9).values, whole.values, rtol=1e-10, atol=1e-14)


class Counting(MatrixOperator):
    """Notes how many rows each product has."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__(matrix)
        self.rows: list[int] = []

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows.append(rows.shape[0])
        return super()._product(rows)

    def inverse_harmonic_mean(self, rows: torch.Tensor, damping: float) -> torch.Tensor:
        return rows / damping

    def mean_square_gradient(self) -> float:
        return float(self._matrix.trace())


@pytest.mark.parametrize(
    ("solver", "k", "measured"),
    [
        (NystroemSketch(0.1, rank=9), 40, 0),  # less than a tenth of one row's work
        (NystroemSketch(0.1, rank=35), 40, 3),
        (NystroemSketch(0.1, rank=200), 40, 8),
        (NystroemSketch(0.1, rank=200), 5, 5),
        (NystroemSketch(0.1, rank=200, residual_rows=0), 40, 0),
        (NystroemSketch(0.1, rank=9, residual_rows=11), 40, 11),
        (Arnoldi(0.1, rank_estimate=9), 40, 8),
        (Arnoldi(0.1, rank_estimate=3), 40, 4),
        (Arnoldi(0.1, rank_estimate=9, residual_rows=0), 40, 0),
        (InverseHarmonicMean(0.1), 9, 0),
        (InverseHarmonicMean(0.1), 25, 2),
        (InverseHarmonicMean(0.1), 256, 8),
        (InverseHarmonicMean(0.1, residual_rows=256), 256, 256),
    ],
)
def test_few_residuals_are_measured_by_default_and_as_many_as_asked(solver: Any, k: int, measured: int) -> None:
    generator = torch.Generator().manual_seed(0)
    root, rhs = (torch.randn(n, 60, dtype=torch.float64, generator=generator) for n in (70, k))
    rhs[1] = 0
    matrix = root.T @ root
    operator = Counting(matrix)
    state = solver.fit(operator)
    fitted = len(operator.rows)
    solution = solver.solve(state, rhs)
    assert operator.rows[fitted:] == ([measured] if measured else [])
    again = solver.solve(state, rhs).relative_residual
    assert (again.isnan() == solution.relative_residual.isnan()).all()  # always the same rows
    rows = solution.relative_residual.isfinite()
    assert rows[1] and solution.outcome[1] is Outcome.CONVERGED  # a zero row is solved
    assert measured <= int(rows.sum()) <= measured + 1
    where = rows.nonzero().flatten().tolist()
    if 0 < measured < k:
        gaps = [b - a for a, b in itertools.pairwise([-1, *(i for i in where if i != 1), k])]
        assert max(gaps) <= 2 * k // measured  # from all over the rows
        assert f"{measured} of {k} rows" in " ".join(solution.remarks)
    left = rhs - solution.x @ (matrix + 0.1 * torch.eye(60, dtype=torch.float64))
    expected = left.norm(dim=1) / rhs.norm(dim=1).clamp_min(1e-300)
    torch.testing.assert_close(solution.relative_residual[rows], expected[rows], rtol=1e-6, atol=1e-9)
    assert all(solution.outcome[i] is Outcome.APPROXIMATE for i in (~rows).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "solver",
    [NystroemSketch(0.1, rank=3, residual_rows=5), Arnoldi(0.1, rank_estimate=3)],
    ids=["nystroem", "arnoldi"],
)
@pytest.mark.parametrize("measured", [0, 1, 9])
def test_residuals_are_measured_for_as_many_rows_as_asked(solver: NystroemSketch | Arnoldi, measured: int) -> None:
    generator = torch.Generator().manual_seed(0)
    root, rhs = (torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in (8, 5))
    operator = MatrixOperator(root.T @ root)
    whole = solver.solve(solver.fit(operator), rhs)
    some = replace(solver, residual_rows=measured)
    solution = some.solve(some.fit(operator), rhs)
    torch.testing.assert_close(solution.x, whole.x)
    known = {0: [], 1: [2], 9: [0, 1, 2, 3, 4]}[measured]
    assert solution.relative_residual.isfinite().nonzero().flatten().tolist() == known
    both = solution.relative_residual.isfinite() & whole.relative_residual.isfinite()
    torch.testing.assert_close(solution.relative_residual[both], whole.relative_residual[both])
    assert any("residual_rows" in remark for remark in solution.remarks) == (measured < 5)
    assert all(one is not Outcome.CONVERGED for i, one in enumerate(solution.outcome) if i not in known)
    with pytest.raises(SettingError, match="residual_rows"):
        replace(solver, residual_rows=-1)
