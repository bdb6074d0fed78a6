"""InverseHarmonicMean: exact to its own formula, and no more than that."""

import pytest
import torch
from torch import Tensor

from distinfluence import EmpiricalFisherOperator, EmpiricalRisk, InverseHarmonicMeanInfluence, RelativeDamping
from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.errors import SettingError, UnsupportedOperatorError
from distinfluence.solvers import InverseHarmonicMean, Outcome, SolverState
from distinfluence.testing import SolverForm
from distinfluence.testing.systems import randn, relative_error
from tests.reference import Reference
from tests.zoo import build


class Samples(CurvatureOperator):
    """(1/p) Σ_j g g ᵀ over the rows g of a symmetric root of p times the matrix: any matrix as one over samples."""

    positive_semidefinite = True

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        values, vectors = torch.linalg.eigh(matrix.double())
        self.gradients = ((vectors * (self.size * values.clamp_min(0)).sqrt()) @ vectors.T).to(matrix.dtype)
        self._matrix = matrix

    def _product(self, rows: Tensor) -> Tensor:
        return rows @ self._matrix

    def inverse_harmonic_mean(self, rows: Tensor, damping: float) -> Tensor:
        self.work.passes += 1
        weights = 1 / (damping + self.gradients.square().sum(dim=1))
        shrunk: Tensor = (rows @ self.gradients.T * weights) @ self.gradients / self.size
        return (rows - shrunk) / damping

    def mean_square_gradient(self) -> float:
        return float(self._matrix.trace())


def by_definition(gradients: Tensor, damping: float, rhs: Tensor) -> Tensor:
    """rows · (1/N) Σ_j (g gᵀ + λI)⁻¹, each inverse made densely."""
    eye = torch.eye(gradients.shape[1], dtype=torch.float64)
    inverse: Tensor = torch.stack([torch.linalg.inv(torch.outer(g, g) + damping * eye) for g in gradients]).mean(dim=0)
    return rhs @ inverse


class TestInverseHarmonicMean(SolverForm[SolverState]):
    """The form of the contract: its values are those of another formula, and are compared with that below."""

    solver = InverseHarmonicMean(damping=1.0, residual_rows=64)
    accuracy = 1e-10

    def operator(self, matrix: Tensor) -> CurvatureOperator:
        return Samples(matrix)


@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("batch", [1, 5, 23])
def test_rows_are_those_of_the_formula(k: int, damping: float, batch: int) -> None:
    """Whatever the batches: the average is over samples; and whoever shares the call."""
    case = build("mlp classification")
    x, y = case.train
    batches = [(x[i : i + batch], y[i : i + batch]) for i in range(0, 23, batch)]
    operator = EmpiricalFisherOperator(EmpiricalRisk(case.model, case.loss, batches))
    rhs = randn(k, operator.size)
    solver = InverseHarmonicMean(damping)
    solution = solver.solve(solver.fit(operator), rhs)
    expected = by_definition(Reference(case).gradients(case.train), damping, rhs)
    assert relative_error(solution.x, expected) <= 1e-8
    alone = solver.solve(solver.fit(operator), rhs[:1])
    assert relative_error(alone.x, expected[:1]) <= 1e-8
    assert "not the inverse of their average" in solution.remarks[0]


def test_it_costs_a_pass_and_another_for_the_residual() -> None:
    case = build("mlp classification")
    operator = EmpiricalFisherOperator(EmpiricalRisk(case.model, case.loss, case.train))
    solver = InverseHarmonicMean(0.1, residual_rows=99)
    state = solver.fit(operator)
    assert operator.work.passes == 0
    solution = solver.solve(state, randn(4, operator.size))
    assert operator.work.passes == 2
    assert set(solution.outcome) == {Outcome.APPROXIMATE}  # rough, and says so
    assert not solution.converged.any()


def test_one_sample_is_solved_exactly() -> None:
    case = build("mlp classification", n_train=1)
    operator = EmpiricalFisherOperator(EmpiricalRisk(case.model, case.loss, case.train))
    solver = InverseHarmonicMean(0.3, residual_rows=99)
    solution = solver.solve(solver.fit(operator), randn(3, operator.size))
    assert solution.converged.all()


def test_blocks_and_the_authors_rule_for_the_damping() -> None:
    case = build("mlp classification")
    model = InverseHarmonicMeanInfluence(case.model, case.loss, RelativeDamping(0.1), block_structure="layer_wise").fit(
        case.train
    )
    gradients, tests = Reference(case).gradients(case.train), Reference(case).gradients(case.test)
    by_block = model.influences_by_block(*case.test, *case.train)
    for block, columns in model.risk.blocks.columns.items():
        own = gradients[:, columns]
        damping = 0.1 * float(own.square().sum(dim=1).mean()) / own.shape[1]
        assert model.damping[block] == pytest.approx(damping, rel=1e-10)
        expected = by_definition(own, damping, tests[:, columns]) @ own.T
        torch.testing.assert_close(by_block[block], expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    assert model.second_order_mode == "empirical_fisher"


def test_what_it_cannot_do_is_refused() -> None:
    for damping in (0.0, 0):
        with pytest.raises(SettingError, match="`damping` must be > 0 for DataInf"):
            InverseHarmonicMean(damping)
    case = build("mlp classification")
    with pytest.raises(SettingError, match="`damping` must be > 0 for DataInf"):
        InverseHarmonicMeanInfluence(case.model, case.loss, 0.0)
    with pytest.raises(UnsupportedOperatorError, match="gradients of single samples; MatrixOperator has none"):
        InverseHarmonicMean(0.1).fit(MatrixOperator(torch.eye(3)))
