"""Arnoldi: the contract at full rank, and what the leading eigenpairs promise."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import MatrixOperator
from distinfluence.errors import NonFiniteError, SettingError
from distinfluence.solvers import Arnoldi, Outcome
from distinfluence.solvers.arnoldi import Eigenpairs
from distinfluence.solvers.lanczos import BlockLanczos
from distinfluence.solvers.spectrum import random_rows
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import (
    SYSTEM,
    P,
    clustered,
    dense_solution,
    indefinite,
    low_rank,
    randn,
    relative_error,
    with_spectrum,
)


def falling(p: int = 200, ratio: float = 0.9) -> Tensor:
    """Eigenvalues 1, 0.9, 0.81, …"""
    return with_spectrum(ratio ** torch.arange(p, dtype=torch.float64))


def of_both_signs(p: int = 150) -> Tensor:
    """Eigenvalues 1, −0.95, 0.95², −0.95³, …"""
    return with_spectrum((-0.95) ** torch.arange(p, dtype=torch.float64))


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues of largest modulus [rank] and their vectors as rows [rank, p]."""
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)[:rank]
    return values[order], vectors[:, order].T


def projected(matrix: Tensor, rank: int, damping: float, rhs: Tensor) -> Tensor:
    """Vᵀ(D + λ)⁻¹V of each row, dense."""
    values, vectors = leading(matrix, rank)
    return (rhs @ vectors.T / (values + damping)) @ vectors


class TestArnoldi(SolverContract[Eigenpairs]):
    """At full rank there is nothing outside of the eigenvectors: the dense solve, to rounding."""

    solver = Arnoldi(damping=0.0, rank_estimate=P, residual_rows=64)
    accuracy = 1e-8

    @pytest.mark.parametrize("block_size", [None, 1, 7, 64])
    @pytest.mark.parametrize("matrix", [falling(), of_both_signs()], ids=["positive", "both signs"])
    def test_the_eigenpairs_of_largest_modulus_are_found(self, matrix: Tensor, block_size: int | None) -> None:
        solver = Arnoldi(0.1, rank_estimate=12, tol=1e-7, block_size=block_size)
        state = solver.fit(MatrixOperator(matrix))
        values, _ = leading(matrix, 12)
        assert state.n_missed == 0
        # an eigenvalue is off by the square of its vector's residual over the gap, at least 0.05·0.9¹² = 0.014
        torch.testing.assert_close(state.values, values, rtol=0, atol=1e-7**2 / 0.014 + 1e-14)
        residual = (state.vectors @ matrix - state.values[:, None] * state.vectors).norm(dim=1)
        assert float(residual.max()) <= 1e-7 * (1 + 1e-6)
        torch.testing.assert_close(state.residuals, residual, rtol=1e-3, atol=1e-13)
        eye = torch.eye(12, dtype=torch.float64)
        torch.testing.assert_close(state.vectors @ state.vectors.T, eye, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("matrix", [falling(), of_both_signs()], ids=["positive", "both signs"])
    def test_the_solution_is_the_projected_one_or_that_with_the_complement(self, matrix: Tensor) -> None:
        rhs, damping, rank = randn(5, matrix.shape[0]), 0.13, 12  # −0.13 is in a gap of the spectrum
        expected = projected(matrix, rank, damping, rhs)
        solver = Arnoldi(damping, rank_estimate=rank, tol=1e-9)
        state = solver.fit(MatrixOperator(matrix))
        # vectors are off by their residual over the gap, 1e-9 / 0.014, and D + λ is at least 0.01 beside ‖A‖ = 1
        allowed = 1e-9 / 0.014 / 0.01
        assert relative_error(solver.solve(state, rhs).x, expected) <= allowed
        _, vectors = leading(matrix, rank)
        expected += (rhs - rhs @ vectors.T @ vectors) / damping
        assert relative_error(replace(solver, complement=True).solve(state, rhs).x, expected) <= allowed

    def test_the_complement_is_exact_where_the_matrix_is_of_that_rank(self) -> None:
        solver = Arnoldi(0.05, rank_estimate=9, complement=True)
        rhs = randn(4, P)
        solution = solver.solve(solver.fit(MatrixOperator(low_rank())), rhs)
        assert solution.converged.all()
        assert relative_error(solution.x, dense_solution(low_rank(), 0.05, rhs)) <= self.accuracy
        assert solution.remarks == ()

    def test_a_projection_that_leaves_most_of_a_row_out_says_so(self) -> None:
        solver = Arnoldi(0.1, rank_estimate=2, residual_rows=99)
        state, rhs = solver.fit(MatrixOperator(falling())), randn(40, 200)
        solution = solver.solve(state, rhs)
        assert set(solution.outcome) == {Outcome.APPROXIMATE}
        _, vectors = leading(falling(), 2)
        share = (rhs - rhs @ vectors.T @ vectors).norm(dim=1) / rhs.norm(dim=1)
        (remark,) = solution.remarks
        assert f"leaves out {float(share.min()):.0%} to {float(share.max()):.0%} of the norm of the rows" in remark
        assert not any("leaves out" in r for r in replace(solver, complement=True).solve(state, rhs).remarks)
        inside = randn(3, 2) @ state.vectors
        assert solver.solve(state, inside).remarks == ()

    def test_many_vectors_take_few_passes(self) -> None:
        """Rank over block width, and a few more: not a pass for each vector."""
        passes = {}
        for block in (1, 16):
            operator = MatrixOperator(falling(400, 0.97))
            state = Arnoldi(0.1, rank_estimate=64, block_size=block, maxiter=400).fit(operator)
            assert state.n_missed == 0
            passes[block] = operator.work.passes
        assert passes[1] >= 64
        assert 4 <= passes[16] <= 2 * math.ceil(passes[1] / 16)

    def test_solving_takes_one_pass_and_another_damping_none(self) -> None:
        operator = MatrixOperator(SYSTEM.matrix)
        solver = Arnoldi(SYSTEM.damping, rank_estimate=P)
        arrays = solver.state_arrays(solver.fit(MatrixOperator(SYSTEM.matrix)))
        other = solver.at(3 * SYSTEM.damping)
        state = other.adapt(solver.restore(operator, arrays))
        assert operator.work.passes == 0
        x = other.solve(state, SYSTEM.rhs(3)).x
        assert (operator.work.passes, operator.work.rows) == (1, 3)
        assert relative_error(x, dense_solution(SYSTEM.matrix, 3 * SYSTEM.damping, SYSTEM.rhs(3))) <= self.accuracy

    @pytest.mark.parametrize(("rank", "max_basis"), [(10, 30), (10, 36), (30, 70)])
    def test_a_bounded_basis_finds_the_same_by_restarts(self, rank: int, max_basis: int) -> None:
        free, bound = MatrixOperator(of_both_signs()), MatrixOperator(of_both_signs())
        solver = Arnoldi(0.1, rank_estimate=rank)
        expected = solver.fit(free)
        state = replace(solver, max_basis=max_basis).fit(bound)
        assert free.work.rows > max_basis  # or nothing was restarted
        assert bound.work.passes >= free.work.passes
        assert state.n_missed == expected.n_missed == 0
        torch.testing.assert_close(state.values, leading(of_both_signs(), rank)[0], rtol=0, atol=1e-9)
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(state.vectors @ state.vectors.T, eye, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("block_size", [1, 4, 16])
    @pytest.mark.parametrize("rank", [10, P])
    @pytest.mark.parametrize("name", ["identity", "clustered", "low rank", "zeros"])
    def test_repeated_eigenvalues_are_found_as_often_as_they_are_there(
        self, name: str, rank: int, block_size: int
    ) -> None:
        """A Krylov space holds at most one vector of an eigenspace for each start vector; then it must start afresh."""
        matrix = {
            "identity": torch.eye(P, dtype=torch.float64),
            "clustered": clustered(),
            "low rank": low_rank(),
            "zeros": torch.zeros(P, P, dtype=torch.float64),
        }[name]
        state = Arnoldi(0.1, rank_estimate=rank, block_size=block_size).fit(MatrixOperator(matrix))
        values, _ = leading(matrix, rank)
        torch.testing.assert_close(state.values.abs(), values.abs(), rtol=0, atol=1e-8)
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(state.vectors @ state.vectors.T, eye, rtol=0, atol=1e-12)

    def test_a_search_that_is_stopped_early_says_what_has_not_converged(self) -> None:
        operator = MatrixOperator(falling(200, 0.99))
        state = Arnoldi(0.1, rank_estimate=10, maxiter=3).fit(operator)
        assert operator.work.passes == 3
        assert 0 < state.n_missed <= 10
        assert state.n_missed == int((state.residuals > 1e-6 * state.values[0]).sum())
        assert state.remarks[0].startswith(f"{state.n_missed} of 10 eigenvectors have not converged")
        restored = Arnoldi(0.1).restore(operator, Arnoldi(0.1).state_arrays(state))
        assert restored.remarks == state.remarks

    def test_fewer_passes_than_the_rank_needs_give_fewer_vectors(self) -> None:
        matrix, operator = falling(), MatrixOperator(falling())
        state = Arnoldi(0.1, rank_estimate=40, block_size=8, maxiter=2, seed=3).fit(operator)
        assert (operator.work.passes, operator.work.rows) == (2, 16)
        vectors = state.vectors
        assert vectors.shape == (16, 200)
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-13)
        torch.testing.assert_close(vectors @ matrix @ vectors.T, state.values.diag(), rtol=0, atol=1e-13)
        # the space of the start vectors and their products, which two passes reach
        start = random_rows(operator, 8, 3)
        space, _ = torch.linalg.qr(torch.cat([start, start @ matrix]).T)
        torch.testing.assert_close(vectors @ space @ space.T, vectors, rtol=0, atol=1e-11)
        expected, _ = leading(space.T @ matrix @ space, 16)
        torch.testing.assert_close(state.values, expected, rtol=0, atol=1e-12)
        residuals = (vectors @ matrix - state.values[:, None] * vectors).norm(dim=1)
        torch.testing.assert_close(state.residuals, residuals, rtol=1e-9, atol=1e-13)
        assert state.n_missed == int((residuals > 1e-6 * state.values.abs().max()).sum()) > 0

    def test_negative_eigenvalues_are_said_and_kept_or_dropped_as_asked(self) -> None:
        matrix, rhs, damping = indefinite(), randn(4, P), 0.05
        keep, drop = Arnoldi(damping, rank_estimate=P), Arnoldi(damping, rank_estimate=P, indefinite="drop")
        state = keep.fit(MatrixOperator(matrix))
        assert state.positive_definite is False
        assert state.smallest_eigenvalue == pytest.approx(-0.5, rel=1e-6)
        assert any('Use second_order_mode="ggn"' in remark for remark in state.remarks)
        kept = keep.solve(state, rhs)
        assert relative_error(kept.x, dense_solution(matrix, damping, rhs)) <= self.accuracy
        assert "8 negative eigenvalues" in kept.remarks[0]
        assert "kept" in kept.remarks[0]
        assert torch.allclose(kept.curvature, torch.tensor(-0.45, dtype=torch.float64), rtol=1e-6)
        values, vectors = torch.linalg.eigh(matrix)
        positive = values + damping > 0
        expected = (rhs @ vectors[:, positive] / (values + damping)[positive]) @ vectors[:, positive].T
        dropped = drop.solve(state, rhs)
        assert relative_error(dropped.x, expected) <= self.accuracy
        assert "dropped" in dropped.remarks[0]
        assert not dropped.converged.any()

    def test_what_is_known_of_definiteness(self) -> None:
        semidefinite = MatrixOperator(falling(), positive_semidefinite=True)
        assert Arnoldi(0.1).fit(semidefinite).positive_definite is True
        assert Arnoldi(0.0).fit(semidefinite).positive_definite is None
        assert Arnoldi(0.1).fit(MatrixOperator(falling())).positive_definite is None
        assert Arnoldi(0.1).fit(MatrixOperator(falling())).smallest_eigenvalue is None
        assert Arnoldi(0.1, rank_estimate=P).fit(MatrixOperator(SYSTEM.matrix)).positive_definite is True
        assert Arnoldi(0.0, rank_estimate=P).fit(MatrixOperator(low_rank())).positive_definite is False
        # the most negative eigenvalue is among the ten of largest modulus
        state = Arnoldi(0.1).fit(MatrixOperator(of_both_signs()))
        assert state.positive_definite is False
        assert state.smallest_eigenvalue == pytest.approx(-0.95, rel=1e-9)

    def test_the_fit_report_has_eigenvalues_and_residuals(self) -> None:
        details = Arnoldi(0.1, rank_estimate=4).fit(MatrixOperator(falling())).details
        torch.testing.assert_close(details["eigenvalues"], 0.9 ** torch.arange(4, dtype=torch.float64))
        assert details["residuals"].shape == (4,)
        assert float(details["residuals"].max()) <= 1e-6

    def test_float32_finds_vectors_to_its_rounding(self) -> None:
        matrix = falling().float()
        state = Arnoldi(0.1, rank_estimate=20).fit(MatrixOperator(matrix))
        assert state.vectors.dtype == torch.float32
        vectors = state.vectors.double()
        residual = (vectors @ matrix.double() - state.values[:, None] * vectors).norm(dim=1)
        # beside the asked 1e-6, directions below 10·√p·eps of ‖A‖ = 1.7e-5 are taken for rounding
        assert float(residual.max()) <= 1.8e-5
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(20, dtype=torch.float64), rtol=0, atol=2e-6)

    def test_the_same_seed_finds_the_same(self) -> None:
        first, again, other = (
            Arnoldi(0.1, rank_estimate=3, seed=seed).fit(MatrixOperator(falling())) for seed in (5, 5, 6)
        )
        assert torch.equal(first.vectors, again.vectors)
        torch.testing.assert_close(other.values, first.values, rtol=0, atol=1e-10)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("rank_estimate", 0),
            ("tol", -1e-6),
            ("block_size", 0),
            ("maxiter", 0),
            ("seed", -1),
            ("indefinite", "flip"),
            ("max_basis", P + 2 * 16 - 1),
        ],
    )
    def test_settings_are_checked(self, name: str, value: float) -> None:
        with pytest.raises(SettingError, match=f"`{name}` must be"):
            replace(self.solver, **{name: value})

    def test_a_complement_needs_damping(self) -> None:
        with pytest.raises(SettingError, match="`complement` needs a `damping` above 0"):
            Arnoldi(0.0, complement=True)

    def test_a_matrix_that_is_not_finite_is_refused(self) -> None:
        matrix = SYSTEM.matrix
        matrix[2, 3] = matrix[3, 2] = torch.nan
        with pytest.raises(NonFiniteError, match="`operator` must be finite"):
            Arnoldi(0.1).fit(MatrixOperator(matrix))


def test_a_restarted_space_still_knows_its_products_and_residuals() -> None:
    matrix = of_both_signs()
    lanczos = BlockLanczos(MatrixOperator(matrix), random_rows(MatrixOperator(matrix), 5, 0))
    for _ in range(6):
        lanczos.step()
    values, coordinates, residuals = lanczos.ritz()
    lanczos.restart(coordinates[:, 4:11])
    assert lanczos.basis.shape == (7, 150)
    for _ in range(2):
        vectors = lanczos.basis
        torch.testing.assert_close(vectors @ matrix @ vectors.T, lanczos.projected, rtol=0, atol=1e-13)
        found, rotation, after = lanczos.ritz()
        ritz = rotation.T @ vectors
        torch.testing.assert_close((ritz @ matrix - found[:, None] * ritz).norm(dim=1), after, rtol=1e-9, atol=1e-13)
        if lanczos.size == 7:
            torch.testing.assert_close(found, values[4:11], rtol=0, atol=1e-13)
            torch.testing.assert_close(after, residuals[4:11], rtol=1e-9, atol=1e-13)
        lanczos.step()
    assert lanczos.size == 17


def test_an_exhausted_space_goes_on_outside_of_itself() -> None:
    matrix = torch.eye(6, dtype=torch.float64)
    lanczos = BlockLanczos(MatrixOperator(matrix), matrix[:2])
    lanczos.step()
    assert lanczos.exhausted
    lanczos.widen(randn(9, 6))
    assert lanczos.next.shape == (4, 6)
    lanczos.step()
    torch.testing.assert_close(lanczos.basis @ lanczos.basis.T, matrix, rtol=0, atol=1e-14)
    assert lanczos.exhausted
    lanczos.widen(randn(3, 6))
    assert lanczos.exhausted


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_space_that_is_nearly_everything_takes_no_rounding_in(missing: int) -> None:
    """Of more rows than there are dimensions left, all but those is rounding, whatever it is scaled to."""
    p = 119
    matrix = torch.eye(p, dtype=torch.float64)
    start, _ = torch.linalg.qr(randn(p, p - missing))
    for seed in range(20):
        lanczos = BlockLanczos(MatrixOperator(matrix), start.T)
        lanczos.step()
        lanczos.widen(randn(16, p, seed=seed))
        assert lanczos.next.shape == (missing, p)
        assert not missing or float((lanczos.next @ lanczos.basis.T).abs().max()) <= 1e-13


def test_the_memory_of_the_basis_stays_within_its_bound() -> None:
    operator = MatrixOperator(falling())
    lanczos = BlockLanczos(operator, random_rows(operator, 7, 0), most=35)
    for _ in range(5):
        lanczos.step()
    assert lanczos.basis.untyped_storage().nbytes() == 35 * 200 * 8
