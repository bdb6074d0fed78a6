"""Plans name the passes of a fit before it starts; where the method fixes them, those are made."""

from typing import Any

import pytest

from distinfluence import (
    AutoInfluence,
    CgInfluence,
    ChebyshevInfluence,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    InverseHarmonicMeanInfluence,
    JacobiPreConditioner,
    KrylovInfluence,
    LissaInfluence,
    NystroemPreConditioner,
    NystroemSketchInfluence,
)
from tests.zoo import Case, build

MODES = ("hessian", "ggn", "empirical_fisher")
STRUCTURES = ("full", "layer_wise")


@pytest.fixture(scope="module", params=["mlp classification", "cnn"])
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


def passes(model: InfluenceFunctionModel, case: Case) -> tuple[int, int]:
    """Made by a fit in ragged batches, and planned."""
    planned = model.demand().fit.passes
    x, y = case.train
    model.fit([(x[start : start + 7], y[start : start + 7]) for start in range(0, len(x), 7)])
    return model.reducer.passes, planned


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [DirectInfluence, NystroemSketchInfluence, AutoInfluence])
def test_a_method_that_makes_a_matrix_passes_as_often_as_planned(
    method: Any, mode: str, structure: str, case: Case
) -> None:
    model = method(case.model, case.loss, hessian_regularization=0.5, second_order_mode=mode, block_structure=structure)
    made, planned = passes(model, case)
    assert made == planned > 0


@pytest.mark.parametrize("method", [CgInfluence, KrylovInfluence, LissaInfluence, InverseHarmonicMeanInfluence])
def test_a_method_whose_work_is_in_the_solve_makes_no_pass_to_fit(method: Any, case: Case) -> None:
    assert passes(method(case.model, case.loss, hessian_regularization=0.5), case) == (0, 0)


@pytest.mark.parametrize("update_diagonal", [False, True])
def test_ekfac_passes_as_often_as_planned(update_diagonal: bool, case: Case) -> None:
    model = EkfacInfluence(case.model, update_diagonal, hessian_regularization=0.5, loss=case.loss)
    made, planned = passes(model, case)
    assert made == planned == 1 + update_diagonal


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conditioner", [JacobiPreConditioner(12), NystroemPreConditioner(5)], ids=["jacobi", "sketch"])
def test_a_preconditioner_passes_as_often_as_planned(conditioner: Any, mode: str, case: Case) -> None:
    model = CgInfluence(
        case.model, case.loss, hessian_regularization=0.5, pre_conditioner=conditioner, second_order_mode=mode
    )
    made, planned = passes(model, case)
    assert made == planned == 1


def test_a_method_that_only_the_matrix_tells_says_that_its_passes_are_usual_ones(case: Case) -> None:
    model = ChebyshevInfluence(case.model, case.loss, hessian_regularization=0.5, second_order_mode="ggn")
    assert not model.demand().by_method
    made, planned = passes(model, case)
    assert 0 < made <= 2 * planned  # of this matrix, whose condition number is about ten
