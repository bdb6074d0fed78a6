"""Plans name the passes and the products of a run before it starts; where the method fixes them, those are made."""

import inspect
from typing import Any

import pytest
from torch import Tensor

from distinfluence import (
    AutoInfluence,
    CgInfluence,
    DirectInfluence,
    InfluenceFunctionModel,
    JacobiPreConditioner,
    LissaInfluence,
    NystroemPreConditioner,
    NystroemSketchInfluence,
)
from distinfluence.curvature import GGNOperator, PlannedWork
from distinfluence.curvature.empirical_fisher import EmpiricalFisherProduct, HarmonicMeanProduct
from distinfluence.curvature.ggn import GGNProduct
from distinfluence.curvature.hessian import HessianProduct
from distinfluence.influence.registry import METHODS
from distinfluence.model.reducer import Kernel, LocalReducer
from distinfluence.model.risk import forward_flops
from distinfluence.solvers.demand import Demand
from tests.zoo import Case, build

MODES = ("hessian", "ggn", "empirical_fisher")
STRUCTURES = ("full", "layer_wise")
PRODUCTS = (HessianProduct, GGNProduct, EmpiricalFisherProduct, HarmonicMeanProduct)
USUAL = 3  # times more or less than planned, where the matrix decides
SETTINGS: dict[str, dict[str, Any]] = {
    "ekfac": {"residual_rows": 2},
    "lissa": {"maxiter": 40},
    "arnoldi": {"rank_estimate": 4},
    "nystroem": {"residual_rows": 2},
    "datainf": {"residual_rows": 2},
}


class Counting(LocalReducer):
    """Ragged batches of seven, and the rows that were multiplied with them: the work that plans count."""

    def __init__(self, model: InfluenceFunctionModel, case: Case) -> None:
        self.rows = self.steps = 0
        x, y = case.train
        super().__init__(model.risk, [(x[start : start + 7], y[start : start + 7]) for start in range(0, len(x), 7)])

    def map(self, kernel: Kernel, *broadcast: Tensor) -> Any:
        self.rows += broadcast[0].shape[0] if isinstance(kernel, PRODUCTS) else 0
        return super().map(kernel, *broadcast)

    def one(self, index: int, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        self.steps += isinstance(kernel, PRODUCTS)
        return super().one(index, kernel, *broadcast)

    def taken(self) -> tuple[int, int]:
        """Return passes and rows since the last call."""
        taken, self.passes, self.rows = (self.passes, self.rows), 0, 0
        return taken


@pytest.fixture(scope="module", params=["mlp classification", "cnn"])
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


@pytest.fixture(scope="module")
def mlp() -> Case:
    return build("mlp classification")


def planned_for(model: InfluenceFunctionModel, case: Case) -> Demand:
    return model.demand(len(case.train[0]), forward_flops(model.risk, case.train))


def counts(work: PlannedWork) -> tuple[int, int]:
    return work.passes, work.rows


def fitted(model: InfluenceFunctionModel, case: Case) -> tuple[int, int]:
    """Return the passes and rows of a fit."""
    reducer = Counting(model, case)
    model.fit(reducer)
    return reducer.taken()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [DirectInfluence, NystroemSketchInfluence, AutoInfluence])
def test_a_method_that_makes_a_matrix_does_the_work_that_is_planned(
    method: Any, mode: str, structure: str, case: Case
) -> None:
    model = method(case.model, case.loss, hessian_regularization=0.5, second_order_mode=mode, block_structure=structure)
    made = fitted(model, case)
    assert made == counts(planned_for(model, case).fit)
    assert made[0] > 0


@pytest.mark.parametrize("name", METHODS)
def test_what_the_fit_and_the_solve_of_every_method_take_is_what_is_planned(name: str, mlp: Case) -> None:
    known = inspect.signature(METHODS[name]).parameters
    usual = {"hessian_regularization": 0.02, "second_order_mode": "ggn"}
    settings = {key: value for key, value in usual.items() if key in known} | SETTINGS.get(name, {})
    model = METHODS[name](mlp.model, loss=mlp.loss, **settings)
    demand, reducer, k = planned_for(model, mlp), Counting(model, mlp), len(mlp.test[0])
    model.fit(reducer)
    made_fit, planned_fit = reducer.taken(), counts(demand.fit)
    model.influence_factors(*mlp.test)
    made_solve, steps = reducer.taken(), reducer.steps
    planned_solve = demand.solve.passes_for(k, mlp.n_parameters), demand.solve.rows_for(k, mlp.n_parameters)
    assert steps <= demand.solve.batches
    if demand.by_method:
        assert made_fit == planned_fit
        assert made_solve == planned_solve
        return
    for made, planned in zip((*made_fit, *made_solve), (*planned_fit, *planned_solve), strict=True):
        assert made <= USUAL * planned
        assert planned <= USUAL * made


def test_a_dense_matrix_that_does_not_fit_into_one_pass_counts_all_of_them(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = case.n_parameters
    monkeypatch.setattr("distinfluence.curvature.base.IDENTITY_BYTES", 8 * p * 9)  # nine columns at once
    model = DirectInfluence(case.model, case.loss, 0.5, second_order_mode="ggn")
    assert fitted(model, case) == counts(planned_for(model, case).fit) == (-(-p // 9), p)


def test_a_dense_matrix_of_gradients_is_one_pass_and_a_product_of_matrices(case: Case) -> None:
    work = planned_for(DirectInfluence(case.model, case.loss, 0.5, second_order_mode="empirical_fisher"), case).fit
    n, p = len(case.train[0]), case.n_parameters
    assert (work.passes, work.rows, work.derivatives) == (1, 0, 1)
    assert work.flops == pytest.approx(2 * n * p**2 + p**3 / 3)


@pytest.mark.parametrize("full_batch", [False, True])
def test_lissa_plans_the_steps_that_it_may_take(full_batch: bool, mlp: Case) -> None:
    model = LissaInfluence(
        mlp.model, mlp.loss, 0.5, maxiter=9, rtol=1e-12, scale=None, full_batch=full_batch, second_order_mode="ggn"
    )
    demand, reducer = planned_for(model, mlp), Counting(model, mlp)
    model.fit(reducer)
    passes, rows = reducer.taken()
    assert 0 < passes <= demand.fit.passes
    assert 0 < rows <= demand.fit.rows
    before = reducer.steps
    model.influence_factors(*mlp.test)
    passes, rows = reducer.taken()
    assert passes == demand.solve.passes_for(6, mlp.n_parameters) == (10 if full_batch else 1)
    assert reducer.steps - before == demand.solve.batches == (0 if full_batch else 9)


@pytest.mark.parametrize("update_diagonal", [False, True])
def test_ekfac_passes_as_often_as_planned(update_diagonal: bool, case: Case) -> None:
    model = METHODS["ekfac"](case.model, update_diagonal=update_diagonal, hessian_regularization=0.5, loss=case.loss)  # type: ignore[call-arg]
    made, planned = fitted(model, case), planned_for(model, case).fit
    assert made[0] == planned.passes == 1 + update_diagonal
    assert planned.derivatives == 3 * planned.passes  # the classes of both models


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conditioner", [JacobiPreConditioner(12), NystroemPreConditioner(5)], ids=["jacobi", "sketch"])
def test_a_preconditioner_does_the_work_that_is_planned(conditioner: Any, mode: str, mlp: Case) -> None:
    model = CgInfluence(
        mlp.model,
        mlp.loss,
        hessian_regularization=0.5,
        pre_conditioner=conditioner,
        second_order_mode=mode,
        block_structure="layer_wise",
    )
    made, blocks = fitted(model, mlp), len(model.risk.blocks.names)
    assert made == counts(planned_for(model, mlp).fit)
    assert made[0] == blocks


def test_an_operator_counts_the_flops_of_its_products_by_the_model(case: Case) -> None:
    model = DirectInfluence(case.model, case.loss, 0.5, second_order_mode="ggn").fit(case.train)
    (operator,) = model.operators.values()
    assert isinstance(operator, GGNOperator)
    n, p = len(case.train[0]), case.n_parameters
    flops = forward_flops(model.risk, case.train)
    assert operator.product_flops == 6 * n * max(2 * p, flops)
    # an MLP of 4-5-3, without its biases; a convolution of 3 × 3 on 4 × 4 positions and 2 channels, and a layer 32 → 3
    assert flops in (2 * (4 * 5 + 5 * 3), 2 * (9 * 2 * 16 + 32 * 3))
