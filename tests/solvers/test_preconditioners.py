"""Preconditioners: positive definite whatever comes, really used, and re-usable."""

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.errors import SettingError
from distinfluence.solvers import CG, BlockCG, JacobiPreConditioner, NystroemPreConditioner, Outcome
from distinfluence.solvers.conjugate import ConjugateSolver
from distinfluence.testing.systems import (
    P,
    dense_solution,
    indefinite,
    low_rank,
    randn,
    relative_error,
    spd,
    with_spectrum,
)

SOLVERS = [CG(1e-3, rtol=1e-8), BlockCG(1e-3, rtol=1e-8)]
PRECONDITIONERS = [JacobiPreConditioner(20), NystroemPreConditioner(10), NystroemPreConditioner(2, adaptive=True)]


class HessianLike(MatrixOperator):
    """An indefinite matrix with a positive semi-definite relative."""

    def __init__(self, matrix: Tensor, relative: Tensor) -> None:
        super().__init__(matrix)
        self.relative = MatrixOperator(relative, positive_semidefinite=True)

    def gauss_newton(self) -> CurvatureOperator:
        return self.relative


def few_large(p: int = 200, n: int = 12) -> Tensor:
    """A dozen large eigenvalues over a flat rest, as of a network with a dozen outputs."""
    return with_spectrum(torch.cat([torch.logspace(1, -1, n), torch.full((p - n,), 1e-4)]))


def run(solver: ConjugateSolver, operator: CurvatureOperator, rhs: Tensor, preconditioner: Any) -> Any:
    solver = replace(solver, preconditioner=preconditioner)
    state = solver.fit(operator)
    before = operator.work.passes
    return solver.solve(state, rhs), operator.work.passes - before


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("k", [1, 5, 60])
def test_the_solution_is_that_of_a_dense_solve(solver: ConjugateSolver, preconditioner: Any, k: int) -> None:
    matrix, rhs = spd(cond=1e3), randn(k, P)
    rhs[0] = 0
    if k > 2:
        rhs[2] = rhs[1]
    solution, _ = run(solver, MatrixOperator(matrix, positive_semidefinite=True), rhs, preconditioner)
    assert solution.converged.all()
    # error ≤ rtol · cond
    assert relative_error(solution.x, dense_solution(matrix, 1e-3, rhs)) <= 1e-8 * 1e3


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_nystroem_saves_passes_where_few_eigenvalues_are_large(solver: ConjugateSolver) -> None:
    """And so it is used: a preconditioner that is fitted and then forgotten saves none."""
    rhs = randn(2, 200)
    passes = []
    for preconditioner in (None, NystroemPreConditioner(20), NystroemPreConditioner(80)):
        operator = MatrixOperator(few_large(n=60), positive_semidefinite=True)
        solution, n = run(solver, operator, rhs, preconditioner)
        assert solution.converged.all()
        passes.append(n)
    assert passes[2] <= 8  # condition below 1.3: a digit or more for each step
    assert passes[2] < passes[1] < passes[0]
    assert passes[2] < passes[0] / 2


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_jacobi_saves_passes_where_the_diagonal_is_what_is_wrong(solver: ConjugateSolver) -> None:
    scale = torch.logspace(0, 2, 100, dtype=torch.float64)
    matrix = scale[:, None] * with_spectrum(torch.linspace(1, 1.2, 100)) * scale
    passes = [run(solver, MatrixOperator(matrix), randn(2, 100), m)[1] for m in (None, JacobiPreConditioner(50))]
    assert passes[1] < passes[0] / 2


@pytest.mark.parametrize("preconditioner", [JacobiPreConditioner(1), *PRECONDITIONERS], ids=repr)
@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("name", ["definite", "indefinite", "negative", "low rank", "zero"])
def test_it_is_positive_definite_whatever_the_matrix(preconditioner: Any, damping: float, name: str) -> None:
    matrix = {
        "definite": spd(),
        "indefinite": indefinite(),
        "negative": -spd(),
        "low rank": low_rank(),
        "zero": torch.zeros(P, P, dtype=torch.float64),
    }[name]
    if name == "zero" and isinstance(preconditioner, JacobiPreConditioner) and not damping:
        pytest.skip("no scale at all")
    applied = preconditioner.fit(MatrixOperator(matrix), damping).apply(torch.eye(P, dtype=torch.float64))
    assert applied.isfinite().all()
    torch.testing.assert_close(applied, applied.T, rtol=1e-8, atol=1e-10 * float(applied.abs().max()))
    assert float(torch.linalg.eigvalsh(applied)[0]) > 0


def test_nystroem_is_the_formula_of_its_authors() -> None:
    matrix, damping, rank = low_rank(), 0.1, 6
    fitted = NystroemPreConditioner(rank).fit(MatrixOperator(matrix, positive_semidefinite=True), damping)
    u, values = fitted.sketch.basis, fitted.sketch.values
    inside = u.T @ torch.diag((values[-1] + damping) / (values + damping)) @ u
    expected = inside + torch.eye(P, dtype=torch.float64) - u.T @ u
    torch.testing.assert_close(fitted.apply(torch.eye(P, dtype=torch.float64)), expected, rtol=1e-10, atol=1e-12)


def test_jacobi_is_the_diagonal_in_the_limit_and_clamped_before() -> None:
    matrix = spd()
    few = JacobiPreConditioner(1).fit(MatrixOperator(matrix), 0.0)
    assert few.clamped > 0
    assert (few.diagonal > 0).all()
    assert "were lifted" in few.remarks[0]
    many = JacobiPreConditioner(4000).fit(MatrixOperator(matrix), 0.0)
    # an entry's variance is that of the rest of its row over the number of probes: five deviations
    rest = (matrix.square().sum(dim=1) - matrix.diagonal().square()).sqrt() / 4000**0.5
    assert ((many.diagonal - matrix.diagonal()).abs() <= 5 * rest).all()
    assert many.remarks == ()


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_another_damping_and_another_process_need_no_new_products(solver: ConjugateSolver, preconditioner: Any) -> None:
    operator = MatrixOperator(spd(), positive_semidefinite=True)
    solver = replace(solver, preconditioner=preconditioner)
    state = solver.fit(operator)
    passes = operator.work.passes
    other = solver.at(0.5)
    adapted = other.adapt(state)
    arrays = pickle.loads(pickle.dumps(other.state_arrays(adapted)))
    restored = other.restore(MatrixOperator(spd()), arrays)
    assert operator.work.passes == passes
    assert restored.operator.work.passes == 0
    rhs = randn(3, P)
    assert torch.equal(adapted.precondition(rhs), restored.precondition(rhs))
    assert not torch.equal(adapted.precondition(rhs), state.precondition(rhs))
    assert relative_error(other.solve(adapted, rhs).x, dense_solution(spd(), 0.5, rhs)) <= 1e-7


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_hessian_is_preconditioned_by_its_gauss_newton_matrix(solver: ConjugateSolver) -> None:
    relative = few_large()
    noise = 1e-5 * with_spectrum(torch.linspace(-1, 1, 200), seed=5)
    operator = HessianLike(relative + noise, relative)
    plain, n_plain = run(solver, operator, randn(2, 200), None)
    helped, n_helped = run(solver, operator, randn(2, 200), NystroemPreConditioner(24))
    assert plain.converged.all()
    assert helped.converged.all()
    assert n_helped < n_plain / 2
    state = replace(solver, preconditioner=NystroemPreConditioner(24)).fit(operator)
    assert "of the Gauss–Newton matrix" in state.remarks[0]


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_negative_curvature_is_found_all_the_same(solver: ConjugateSolver, preconditioner: Any) -> None:
    solution, _ = run(solver, MatrixOperator(indefinite()), randn(3, P), preconditioner)
    assert set(solution.outcome) == {Outcome.NEGATIVE_CURVATURE}


def test_an_adaptive_rank_grows_until_the_error_is_small_and_uses_what_is_there() -> None:
    operator = MatrixOperator(few_large(), positive_semidefinite=True)
    fitted = NystroemPreConditioner(2, adaptive=True).fit(operator, 1e-3)
    assert 12 <= fitted.rank <= 32
    assert fitted.error <= 10 * 1e-3
    assert operator.work.rows <= fitted.rank + 5 * 4 * 5  # the sketch's rows once each, and the power iterations
    small = NystroemPreConditioner(2, adaptive=True, max_rank=4).fit(operator, 1e-3)
    assert small.rank == 4
    assert "rank 4, effective dimension" in small.remarks[0]


def test_settings_are_checked() -> None:
    for settings in ({"rank": 0}, {"rank": 9, "adaptive": True, "max_rank": 5}):
        with pytest.raises(SettingError, match="must be a whole number ≥"):
            NystroemPreConditioner(**settings)
    with pytest.raises(SettingError, match="`num_samples_estimator` must be a whole number ≥ 1"):
        JacobiPreConditioner(0)
