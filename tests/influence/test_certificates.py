"""Error bounds, certified self-influence, spectra and refinement against dense float64 references."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distinfluence import CgInfluence, DirectInfluence, InfluenceFunctionModel, KrylovInfluence
from distinfluence.errors import SettingError
from tests.reference import Reference
from tests.zoo import Case, build

MODELS = ["mlp classification", "mlp regression", "cnn", "tied weights", "attention"]


def holds(model: InfluenceFunctionModel, case: Case, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The bound holds for every entry; the bounds and the errors [n_test, n_train]."""
    factors, report = model.influence_factors(*case.test, return_report=True)
    assert report.error_bound is not None
    tile = model.tile(factors, model.place(*case.train))
    errors = (tile.values.double() - expected).abs()
    bounds = report.error_bound[:, None] * tile.gradient_norms.double()
    assert (errors <= bounds).all()
    return bounds, errors


@pytest.mark.parametrize("mode", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-3])
def test_the_bound_holds_for_every_entry(name: str, mode: str, damping: float) -> None:
    case = build(name)
    expected = Reference(case).influences(mode, damping)
    settings: dict[str, Any] = {"second_order_mode": mode}
    for rtol in (1e-2, 1e-6):
        for method in (CgInfluence, KrylovInfluence):
            model = method(case.model, case.loss, damping, rtol=rtol, **settings).fit(case.train)
            holds(model, case, expected)
    early = CgInfluence(case.model, case.loss, damping, maxiter=1, **settings).fit(case.train)
    bounds, errors = holds(early, case, expected)
    if float(errors.max()) > 1e-6:
        assert float(bounds.median() / errors.median()) < 1e5  # and says something
    holds(DirectInfluence(case.model, case.loss, damping, **settings).fit(case.train), case, expected)


@pytest.mark.parametrize("structure", ["layer_wise", "parameter_wise"])
def test_the_bound_holds_over_blocks(structure: str) -> None:
    case = build("mlp classification")
    exact = DirectInfluence(case.model, case.loss, 0.01, second_order_mode="ggn", block_structure=structure)
    expected = exact.fit(case.train).influences(*case.test, *case.train)
    model = CgInfluence(case.model, case.loss, 0.01, rtol=1e-2, second_order_mode="ggn", block_structure=structure).fit(
        case.train
    )
    holds(model, case, expected)


@pytest.mark.parametrize("name", ["mlp classification", "cnn"])
def test_the_bound_holds_in_float32(name: str) -> None:
    wide = build(name)
    model = nn.Module.float(build(name).model)
    x, y = wide.train
    case = Case(model, wide.loss, (x.float(), y), (wide.test[0].float(), wide.test[1]))
    # the float32 model is the float64 one rounded: its reference is that of the rounded parameters and data
    exact = Case(
        build(name).model.float().double(), wide.loss, *((a.float().double(), b) for a, b in (wide.train, wide.test))
    )
    expected = Reference(exact).influences("ggn", 1e-2)
    for rtol in (1e-2, 1e-4):
        ours = CgInfluence(case.model, case.loss, 1e-2, rtol=rtol, second_order_mode="ggn").fit(case.train)
        holds(ours, case, expected)


def test_whether_a_bound_is_rigorous_is_said() -> None:
    case = build("mlp classification")
    for mode, expected in (("ggn", True), ("empirical_fisher", True)):
        model = CgInfluence(case.model, case.loss, 0.1, second_order_mode=mode).fit(case.train)
        _, report = model.influence_factors(*case.test, return_report=True)
        assert report.rigorous is expected

    def odd(outputs: Tensor, targets: Tensor) -> Tensor:  # convex, but nobody knows
        return nn.functional.cross_entropy(outputs, targets)

    model = CgInfluence(case.model, odd, 0.1, second_order_mode="ggn").fit(case.train)
    _, report = model.influence_factors(*case.test, return_report=True)
    assert report.error_bound is None
    assert not report.rigorous


def test_a_hessian_has_a_heuristic_bound_once_its_spectrum_is_asked_for() -> None:
    case = build("mlp classification")
    values = torch.linalg.eigvalsh(Reference(case).matrix("hessian"))
    damping = 0.05 - 1.5 * float(values[0])
    model = CgInfluence(case.model, case.loss, damping, rtol=1e-3).fit(case.train)
    assert model.influence_factors(*case.test, return_report=True)[1].error_bound is None
    assert model.fit_report.positive_definite == {"full": None}
    before = model.reducer.passes
    extremes = model.spectrum()["full"]
    assert model.reducer.passes - before == extremes.passes <= 40
    assert extremes.lower <= float(values[0]) <= extremes.smallest + 1e-12
    assert extremes.largest - 1e-12 <= float(values[-1]) <= extremes.upper
    assert model.spectrum()["full"] == extremes
    assert model.reducer.passes - before == extremes.passes  # once
    assert model.fit_report.positive_definite == {"full": True}
    holds(model, case, Reference(case).influences("hessian", damping))
    assert not model.influence_factors(*case.test, return_report=True)[1].rigorous


def test_an_indefinite_matrix_is_said_and_has_no_bound() -> None:
    case = build("mlp classification")
    model = KrylovInfluence(case.model, case.loss, 1e-4).fit(case.train)
    assert float(torch.linalg.eigvalsh(Reference(case).matrix("hessian"))[0]) < -1e-4
    model.spectrum()
    assert model.fit_report.positive_definite == {"full": False}
    assert "not positive definite: full" in str(model.fit_report)
    _, report = model.influence_factors(*case.test, return_report=True)
    assert report.error_bound is None
    assert "indefinite" in str(report)
    with pytest.raises(SettingError, match="needs A \\+ λI positive definite"):
        model.self_influences(*case.train)


def test_direct_knows_the_smallest_eigenvalue_of_a_hessian() -> None:
    case = build("mlp classification")
    damping = 0.05 - 1.5 * float(torch.linalg.eigvalsh(Reference(case).matrix("hessian"))[0])
    model = DirectInfluence(case.model, case.loss, damping).fit(case.train)
    holds(model, case, Reference(case).influences("hessian", damping))


@pytest.mark.parametrize("structure", ["full", "layer_wise"])
@pytest.mark.parametrize("name", ["mlp classification", "cnn", "tied weights"])
def test_self_influence_lies_between_its_bounds(name: str, structure: str) -> None:
    case = build(name)
    model = KrylovInfluence(case.model, case.loss, 1e-2, second_order_mode="ggn", block_structure=structure).fit(
        case.train
    )
    exact = DirectInfluence(case.model, case.loss, 1e-2, second_order_mode="ggn", block_structure=structure)
    expected = exact.fit(case.train).influences(*case.train).diagonal()
    passes = []
    for rtol in (1e-1, 1e-3, 1e-6):
        before = model.reducer.passes
        found = model.self_influences(*case.train, rtol=rtol)
        passes.append(model.reducer.passes - before)
        assert (found.lower <= expected * (1 + 1e-9)).all()
        assert (expected * (1 - 1e-9) <= found.upper).all()
        assert ((found.upper - found.lower) <= 1.001 * rtol * expected).all()
        assert found.rigorous
    assert passes == sorted(passes)
    assert passes[0] < passes[2]


def test_refinement_brings_float32_to_a_float64_residual() -> None:
    wide = build("mlp classification")
    case = Case(
        wide.model.float(), wide.loss, (wide.train[0].float(), wide.train[1]), (wide.test[0].float(), wide.test[1])
    )
    exact = Case(
        build("mlp classification").model.float().double(),
        wide.loss,
        *((a.float().double(), b) for a, b in (wide.train, wide.test)),
    )
    model = KrylovInfluence(case.model, case.loss, 1e-2, refine=True, second_order_mode="ggn").fit(case.train)
    gradients = model.measurement_gradients(model.place(*case.test)).rows
    factors, report = model.solve(gradients)
    assert factors.dtype == torch.float64
    assert report.converged.all()
    assert (report.relative_residual <= 1e-10).all()
    matrix = Reference(exact).matrix("ggn") + 1e-2 * torch.eye(factors.shape[1]).double()
    residual = (gradients.double() - factors @ matrix).norm(dim=1) / gradients.double().norm(dim=1)
    assert (residual <= 2e-10).all()  # by a matrix that shares no code
    plain, _ = KrylovInfluence(case.model, case.loss, 1e-2, second_order_mode="ggn").fit(case.train).solve(gradients)
    assert float((gradients.double() - plain.double() @ matrix).norm()) > 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_is_evaluated_in_float32(dtype: torch.dtype) -> None:
    wide = build("mlp classification")
    case = Case(
        wide.model.to(dtype),
        wide.loss,
        (wide.train[0].to(dtype), wide.train[1]),
        (wide.test[0].to(dtype), wide.test[1]),
    )
    exact = Case(
        build("mlp classification").model.to(dtype).double(),
        wide.loss,
        *((a.to(dtype).double(), b) for a, b in (wide.train, wide.test)),
    )
    model = KrylovInfluence(case.model, case.loss, 1e-1, rtol=1e-5, second_order_mode="ggn").fit(case.train)
    ours = model.influences(*case.test, *case.train)
    assert ours.dtype == torch.float32
    expected = Reference(exact).influences("ggn", 1e-1)
    # rtol 1e-5 times a condition of at most about 100: the narrow dtype leaves no trace beyond its parameters
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert "are evaluated in float32" in str(model.fit_report)
    assert next(case.model.parameters()).dtype == dtype
