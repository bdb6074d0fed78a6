"""Dot products and cosines of gradients against autograd, sample by sample."""

from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distinfluence import (
    GradientCosineInfluence,
    GradientDotInfluence,
    SequentialInfluenceCalculator,
)
from distinfluence.errors import SettingError
from distinfluence.evaluate import verify
from distinfluence.influence import scores as scores_module
from distinfluence.influence.layer_scoring import influences_by_layer
from distinfluence.model.reducer import LocalReducer
from tests.benchmarks.memory import peak_bytes
from tests.reference import Reference
from tests.zoo import Case, build

KINDS = [GradientDotInfluence, GradientCosineInfluence]
Kind = type[GradientDotInfluence] | type[GradientCosineInfluence]


CASE = build("mlp classification", n_train=9)


@cache
def fitted(kind: Kind, structure: str = "full") -> GradientDotInfluence | GradientCosineInfluence:
    return kind(CASE.model, CASE.loss, block_structure=structure).fit(CASE.train)


def products(case: Case, kind: Kind) -> Tensor:
    """By definition, from the reference's gradients."""
    test, train = (Reference(case).gradients(data) for data in (case.test, case.train))
    dots = test @ train.T
    if kind is GradientDotInfluence:
        return dots
    sizes = test.norm(dim=1)[:, None] * train.norm(dim=1)
    return torch.where(sizes > 0, dots / torch.where(sizes > 0, sizes, 1.0), 0.0)


@pytest.mark.parametrize(
    ("name", "kind"), [("mlp regression", GradientCosineInfluence), ("tied weights", GradientDotInfluence)]
)
def test_scores_are_products_of_the_gradients_that_autograd_makes(name: str, kind: Kind) -> None:
    case = build(name)
    model = kind(case.model, case.loss).fit(case.train)
    expected = products(case, kind)
    torch.testing.assert_close(model.influences(*case.test, *case.train), expected, rtol=1e-10, atol=1e-12)
    factors, report = model.influence_factors(*case.test, return_report=True)
    torch.testing.assert_close(factors, Reference(case).gradients(case.test), rtol=1e-10, atol=1e-12)
    assert report.converged.all()
    assert not report.relative_residual.any()
    assert "no curvature" in str(model.fit_report)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_and_a_solve_make_no_pass_over_the_data(kind: Kind) -> None:
    case = build("mlp classification")
    model = kind(case.model, case.loss)
    reducer = LocalReducer(model.risk, case.train)
    model.fit(reducer).influences(*case.test, *case.train)
    assert reducer.passes == model.fit_report.passes == 0
    demand = model.demand()
    assert (demand.fit.passes, demand.solve.passes_for(6, 43), demand.by_method) == (0, 0, True)


def test_a_solve_holds_the_vectors_that_plans_reserve() -> None:
    model = GradientCosineInfluence(nn.Linear(20_000, 1, bias=False), nn.MSELoss()).fit(
        (torch.ones(2, 20_000), torch.ones(2, 1))
    )
    rhs = torch.randn(32, model.n_parameters)
    reserved = model.demand().row_vectors
    assert 0.85 * reserved <= 1 + peak_bytes(lambda: model.solve(rhs)) / (4 * rhs.numel()) <= 1.02 * reserved


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_gradient_scores_zero(kind: Kind) -> None:
    base = build("mlp regression")
    (x, y), (x_test, y_test) = [tuple(t.clone() for t in data) for data in (base.train, base.test)]
    y[4], y_test[2] = base.model(x[4:5])[0].detach(), base.model(x_test[2:3])[0].detach()  # fitted exactly
    case = Case(base.model, base.loss, (x, y), (x_test, y_test))
    scores = kind(case.model, case.loss).fit(case.train).influences(*case.test, *case.train)
    assert not scores[2].any() and not scores[:, 4].any()
    assert scores.isfinite().all()
    torch.testing.assert_close(scores, products(case, kind), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["full", "layer_wise"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_layers_add_up_to_the_score(kind: Kind, structure: str) -> None:
    case, model = CASE, fitted(kind, structure)
    whole = products(case, kind)
    by_block = model.influences_by_block(*case.test, *case.train)
    torch.testing.assert_close(sum(by_block.values(), torch.zeros(())), whole, rtol=1e-10, atol=1e-12)
    own = slice(0, 25) if structure == "layer_wise" else slice(None)  # of the first block
    test, train = (Reference(case).gradients(data) for data in (case.test, case.train))
    first = test[:, own] @ train[:, own].T
    if kind is GradientCosineInfluence:  # over the norms of the whole gradients
        first = first / (test.norm(dim=1)[:, None] * train.norm(dim=1))
    torch.testing.assert_close(next(iter(by_block.values())), first, rtol=1e-10, atol=1e-12)
    by_layer = influences_by_layer(model, model.influence_factors(*case.test), model.place(case.train))
    assert len(by_layer) == 2
    torch.testing.assert_close(sum(by_layer.values(), torch.zeros(())), whole, rtol=1e-10, atol=1e-12)
    assert torch.linalg.norm(next(iter(by_layer.values())) - whole) > 0.01 * torch.linalg.norm(whole)


def test_dot_products_have_mode_perturbation() -> None:
    case = build("mlp classification", n_train=9, n_test=2)
    reference, model = Reference(case), fitted(GradientDotInfluence)
    ours = model.influences(*case.test, *case.train, mode="perturbation")
    eye = torch.eye(reference.theta.numel(), dtype=torch.float64)
    reference.matrix = lambda mode: torch.zeros_like(eye)  # type: ignore[method-assign]
    torch.testing.assert_close(ours, reference.perturbation("", 1.0), rtol=1e-8, atol=1e-10)


def test_cosines_refuse_mode_perturbation_before_anything_is_solved(tmp_path: Path) -> None:
    case, model = CASE, fitted(GradientCosineInfluence)
    factors = model.influence_factors(*case.test)
    calculator = SequentialInfluenceCalculator(model)
    for attempt in (
        lambda: model.influences(*case.test, *case.train, mode="perturbation"),
        lambda: model.influences_from_factors(factors, *case.train, mode="perturbation"),
        lambda: model.influences_by_block(*case.test, *case.train, mode="perturbation"),
        lambda: model.tile(factors, model.place(case.train), "perturbation"),
        lambda: calculator.influences(*case.test, mode="perturbation"),
        lambda: calculator.plan(*case.train, *case.test, mode="perturbation"),
        lambda: calculator.to_zarr(tmp_path / "result", *case.test, mode="perturbation", progress=False),
    ):
        with pytest.raises(SettingError, match=r"`mode` must be 'up' for `GradientCosineInfluence`.*GradientDot"):
            attempt()
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_self_influence_is_the_score_of_a_point_with_itself(kind: Kind) -> None:
    case, model = CASE, fitted(kind)
    diagonal = model.influences(*case.train).diagonal()
    for found in (model.self_influences(*case.train), model.self_influences_by_solve(*case.train)):
        torch.testing.assert_close(found.values, diagonal, rtol=1e-9, atol=1e-12)
        assert (found.lower <= diagonal + 1e-12).all() and (diagonal <= found.upper + 1e-12).all()


@pytest.mark.parametrize(("kind", "size"), [(KINDS[0], 2_000), (KINDS[1], 0)])
def test_scores_are_verified_by_another_method(kind: Kind, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("distinfluence.evaluate.verify"), "DIRECT_SIZE", size)  # 0: by a Krylov method
    case = build("mlp classification", dtype=torch.float32)
    model = kind(case.model, case.loss, block_structure="layer_wise").fit(case.train)
    factors, report = model.influence_factors(*case.test, return_report=True)
    scores = model.influences_from_factors(factors, *case.train)
    found = verify(scores, model, case.test, case.train, error_bound=report.error_bound)
    assert found.converged
    assert found.relative_error < 1e-5
    assert found.within_bounds is report.error_bound is None
    wrong = verify(scores.flip(0), model, case.test, case.train, error_bound=report.error_bound)
    assert wrong.relative_error > 0.1


def test_scores_by_layers_of_a_gpu_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "by_layers", lambda device: True)
    case, model = CASE, fitted(GradientCosineInfluence)
    scores = model.influences(*case.test, *case.train)
    torch.testing.assert_close(scores, products(case, GradientCosineInfluence), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_on_disk_holds_the_scores_of_one_call_in_panels_and_with_extras(kind: Kind, tmp_path: Path) -> None:
    case = CASE
    calculator = SequentialInfluenceCalculator(kind(case.model, case.loss)).fit(*case.train, chunk_size=6)
    options = {"panel_size": 2, "test_chunk_size": 4, "contributions": 2, "self_influence": True, "top_k": 3}
    result = calculator.to_zarr(tmp_path / "result", *case.test, progress=False, **options)
    expected = products(case, kind).numpy()
    np.testing.assert_allclose(result.influences[:], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(calculator.influences(*case.test).compute(), expected, rtol=1e-9, atol=1e-12)
    own = np.ones(len(case.train[0])) if kind is GradientCosineInfluence else None
    norms = Reference(case).gradients(case.train).norm(dim=1).numpy()
    np.testing.assert_allclose(result.read("self_influence"), norms**2 if own is None else own, rtol=1e-5)
    assert result.converged.all()
    assert result.provenance["solver"]["second_order_mode"] == "none"
    assert np.isnan(result.error_bound).all()
    assert result.provenance["error_bound"] == "none"
