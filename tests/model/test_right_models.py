"""No right model is refused: every check of a fit, on by default, lets these pass."""

import pytest
import torch

from distinfluence.curvature import SecondOrderMode
from distinfluence.errors import DerivativeError
from distinfluence.influence.checks.derivatives import check_derivatives
from distinfluence.model.blocks import ParameterBlocks
from distinfluence.model.objective import as_objective
from distinfluence.model.reducer import LocalReducer
from distinfluence.model.sample_risk import SampleRisk
from tests.right_models import FLOAT32_ONLY, MODELS

WRONG_HESSIAN = {"weight norm"}  # torch 2.13: the second derivative of its `_weight_norm` is wrong
CASES = [
    (name, dtype)
    for name in MODELS
    for dtype in ("float32", "bfloat16")
    if dtype == "float32" or name not in FLOAT32_ONLY
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_check_lets_a_right_model_pass(name: str, dtype: str) -> None:
    risk, reducer = placed(name, dtype)
    modes = (SecondOrderMode.GGN,) if name in WRONG_HESSIAN else (SecondOrderMode.HESSIAN, SecondOrderMode.GGN)
    probes = [check_derivatives(risk, reducer.drawn, mode).probe for mode in modes]
    assert len(probes[0].losses) == min(16, reducer.n_samples)
    assert probes[0].differences(probes[-1]) == []


def test_a_hessian_that_torch_gets_wrong_is_refused() -> None:
    risk, reducer = placed("weight norm", "float32")
    with pytest.raises(DerivativeError, match=r"⟨u, Hv⟩ is .* 'torch\._weight_norm'"):
        check_derivatives(risk, reducer.drawn, SecondOrderMode.HESSIAN)


def test_there_are_models_of_all_kinds() -> None:
    assert len(MODELS) >= 100


def placed(name: str, dtype: str) -> tuple[SampleRisk, LocalReducer]:
    case = MODELS[name](getattr(torch, dtype))
    risk = SampleRisk(case.model, as_objective(case.loss), ParameterBlocks.of(case.model))
    return risk, LocalReducer(risk, case.data)
