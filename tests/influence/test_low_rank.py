"""Arnoldi and Nyström influence: exact at full rank, honest below it, and small in memory."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from distinfluence import ArnoldiInfluence, InfluenceFunctionModel, NystroemSketchInfluence
from distinfluence.errors import SettingError
from distinfluence.influence.scores import Scorer
from distinfluence.model import gradients as gradients_module
from distinfluence.model.gradients import SampleGradients
from distinfluence.solvers import Outcome
from tests.reference import Reference
from tests.zoo import Case, build

ALL = 10_000  # a rank that every model here stays below
LAYERS = "layer_wise"


def nystroem(case: Case, damping: Any, mode: str = "ggn", rank: int = ALL, **settings: Any) -> NystroemSketchInfluence:
    return NystroemSketchInfluence(case.model, case.loss, rank, damping, second_order_mode=mode, **settings)


def arnoldi(case: Case, damping: Any, mode: str = "ggn", rank: int = ALL, **settings: Any) -> ArnoldiInfluence:
    return ArnoldiInfluence(case.model, case.loss, damping, rank, second_order_mode=mode, **settings)


METHODS = {"nystroem": nystroem, "arnoldi": arnoldi}


def close(ours: Tensor, expected: Tensor) -> None:
    """Both invert in float64 at condition 20 and less: 1e-8 of the largest entry, as the direct method."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def damping_for(case: Case, mode: str) -> float:
    """A twentieth of the norm: the matrix matters."""
    return 0.05 * float(torch.linalg.matrix_norm(Reference(case).matrix(mode), 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("name", ["mlp classification", "cnn", "tied weights"])
def test_at_full_rank_factors_and_influences_are_the_reference(method: str, mode: str, name: str) -> None:
    case = build(name)
    damping = damping_for(case, mode)
    model = METHODS[method](case, damping, mode).fit(case.train)
    factors, report = model.influence_factors(*case.test, return_report=True)
    close(factors, Reference(case).factors(mode, damping))
    close(model.influences(*case.test, *case.train), Reference(case).influences(mode, damping))
    assert report.converged.all()
    assert report.error_bound is not None
    assert report.rigorous


@pytest.mark.parametrize("method", METHODS)
def test_at_full_rank_blocks_are_solved_apart(method: str) -> None:
    case = build("mlp classification")
    damping = {"0": 0.02, "2": 0.05}
    model = METHODS[method](case, damping, block_structure=LAYERS).fit(case.train)
    reference = Reference(case)
    matrix, tests, trains = reference.matrix("ggn"), reference.gradients(case.test), reference.gradients(case.train)
    by_block = model.influences_by_block(*case.test, *case.train)
    for block, own in model.risk.blocks.columns.items():
        inside = matrix[own, own] + damping[block] * torch.eye(own.stop - own.start, dtype=torch.float64)
        close(by_block[block], torch.linalg.solve(inside, tests[:, own].T).T @ trains[:, own].T)
    close(model.influences(*case.test, *case.train), torch.stack(list(by_block.values())).sum(dim=0))


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_is_that_of_each_block_and_at_most_its_size(method: str) -> None:
    case = build("mlp classification")
    model = METHODS[method](case, 0.05, rank=20, block_structure="parameter_wise").fit(case.train)
    found = {block: len(details["eigenvalues"]) for block, details in model.fit_report.details.items()}
    assert found == {block: min(20, size) for block, size in model.fit_report.blocks.items()}
    assert min(found.values()) < 20 == max(found.values())


@pytest.mark.parametrize("method", METHODS)
def test_another_damping_takes_no_pass_over_the_training_data(method: str) -> None:
    case = build("mlp classification")
    model = METHODS[method](case, 0.05).fit(case.train)
    passes = model.reducer.passes
    other = model.with_damping(0.2)
    assert model.reducer.passes == passes
    close(other.influences(*case.test, *case.train), Reference(case).influences("ggn", 0.2))
    dampings = [0.05, 0.1, 0.2]
    swept = model.influences_at(dampings, *case.test, *case.train)
    for damping, influences in zip(dampings, swept, strict=True):
        close(influences, Reference(case).influences("ggn", damping))


@pytest.mark.parametrize("method", METHODS)
def test_a_low_rank_says_how_far_off_it_is(method: str) -> None:
    case = build("mlp classification")
    model = METHODS[method](case, 0.01, rank=3, residual_rows=6).fit(case.train)
    factors, report = model.influence_factors(*case.test, return_report=True)
    matrix = Reference(case).matrix("ggn") + 0.01 * torch.eye(43, dtype=torch.float64)
    gradients = Reference(case).gradients(case.test)
    residual = (gradients - factors @ matrix).norm(dim=1) / gradients.norm(dim=1)
    torch.testing.assert_close(report.relative_residual, residual, rtol=1e-8, atol=0)
    assert set(report.outcome) == {Outcome.APPROXIMATE}
    assert not report.converged.any()
    # the certificate covers what the sketch misses
    error = (model.influences(*case.test, *case.train) - Reference(case).influences("ggn", 0.01)).abs()
    bound = report.error_bound
    assert bound is not None
    assert (error <= bound[:, None] * Reference(case).gradients(case.train).norm(dim=1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_fitted_model_is_restored_without_a_pass(method: str) -> None:
    case = build("mlp classification")
    model = METHODS[method](case, 0.05, rank=8).fit(case.train)
    arrays = pickle.loads(pickle.dumps(model.state_arrays()))
    reducer, passes = model.reducer, model.reducer.passes
    again = METHODS[method](case, 0.05, rank=8).restore(reducer, arrays, model.fit_report)
    assert reducer.passes == passes
    assert torch.equal(again.influence_factors(*case.test), model.influence_factors(*case.test))


@pytest.mark.parametrize("method", METHODS)
def test_settings_fix_the_numbers_and_bad_ones_are_refused_at_once(method: str) -> None:
    case = build("mlp classification")
    settings = METHODS[method](case, 0.05, rank=8, seed=3).settings()
    assert settings["seed"] == 3
    assert 8 in (settings.get("rank"), settings.get("rank_estimate"))
    with pytest.raises(SettingError, match="rank"):
        METHODS[method](case, 0.05, rank=0)
    with pytest.raises(SettingError, match="seed"):
        METHODS[method](case, 0.05, seed=-1)


@pytest.mark.parametrize("method", METHODS)
def test_an_indefinite_hessian_is_said_not_hidden(method: str) -> None:
    case = build("mlp classification")
    assert float(torch.linalg.eigvalsh(Reference(case).hessian())[0]) < -1e-3
    report = METHODS[method](case, 1e-4, "hessian").fit(case.train).fit_report
    assert report.positive_definite == {"full": False}
    assert "A is indefinite" in str(report)
    assert 'second_order_mode="ggn"' in str(report)


def test_a_nystroem_sketch_takes_one_pass_or_two() -> None:
    case = build("mlp classification")
    for mode, passes in (("ggn", 1), ("empirical_fisher", 1), ("hessian", 2)):
        assert nystroem(case, 0.05, mode, rank=5).fit(case.train).fit_report.passes == passes


def test_a_complement_is_better_than_a_projection_where_what_is_missing_lies_below_the_damping() -> None:
    # in a direction of eigenvalue e outside, the complement is off by e/(λ(e + λ)) and the projection by 1/(e + λ)
    case = build("mlp classification")
    damping = 1.01 * float(torch.linalg.eigvalsh(Reference(case).matrix("ggn"))[-4])
    expected = Reference(case).factors("ggn", damping)
    lost, report = arnoldi(case, damping, rank=3).fit(case.train).influence_factors(*case.test, return_report=True)
    assert "leaves out" in str(report)
    kept = arnoldi(case, damping, rank=3, complement=True).fit(case.train).influence_factors(*case.test)
    assert ((kept - expected).norm(dim=1) < (lost - expected).norm(dim=1)).all()
    with pytest.raises(SettingError, match="`complement` needs a `damping` above 0"):
        arnoldi(case, 0.0, complement=True).fit(case.train)


def test_influences_with_the_complement_are_those_of_the_factors() -> None:
    case = build("mlp classification")
    model = arnoldi(case, 0.05, rank=3, complement=True, block_structure=LAYERS).fit(case.train)
    factors = model.influence_factors(*case.test)
    whole, blocks = model.influences(*case.test, *case.train), model.influences_by_block(*case.test, *case.train)
    assert torch.equal(whole, model.influences_from_factors(factors, *case.train))
    close(torch.stack(list(blocks.values())).sum(dim=0), whole)


@pytest.mark.parametrize("structure", ["full", LAYERS])
def test_influences_in_the_projected_space_are_those_of_the_factors(structure: str) -> None:
    case = build("mlp classification", n_test=30)
    model = arnoldi(case, 0.05, rank=5, block_structure=structure).fit(case.train)
    passes = model.reducer.passes
    whole, blocks = model.influences(*case.test, *case.train), model.influences_by_block(*case.test, *case.train)
    assert model.reducer.passes == passes
    factors = model.influence_factors(*case.test)
    expected = model.influences_from_factors(factors, *case.train)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    by_block = model.influences_from_factors_by_block(model.influence_factors_by_block(*case.test), *case.train)
    assert list(blocks) == list(by_block)
    for block, values in by_block.items():
        torch.testing.assert_close(blocks[block], values, rtol=0, atol=1e-12 * float(values.abs().max()))


def test_gradients_are_projected_as_soon_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no more than a micro-batch of samples are p numbers held: GRADIENT_BYTES, here for four samples of 23."""
    case = build("mlp classification", n_test=11)
    model = arnoldi(case, 0.05, rank=5, block_structure=LAYERS).fit(case.train)
    expected = model.influences(*case.test, *case.train)
    monkeypatch.setattr(gradients_module, "GRADIENT_BYTES", 4 * 43 * 8)
    made: list[int] = []

    def spied(kind: str) -> Any:
        original = getattr(Scorer, kind)

        def counted(self: Scorer, batch: Any) -> SampleGradients:
            gradients: SampleGradients = original(self, batch)
            made.append(len(gradients.rows))
            return gradients

        return counted

    for kind in ("loss_gradients", "measurement_gradients"):
        monkeypatch.setattr(Scorer, kind, spied(kind))
    held: list[int] = []
    monkeypatch.setattr(torch, "cat", _recording(torch.cat, held))
    influences = model.influences(*case.test, *case.train)
    monkeypatch.undo()
    assert sum(made) == 11 + 23
    assert max(made) == 4
    # what is put together of all samples is 5 wide for each of two blocks, never 43
    assert max(held) <= 23 * 5
    torch.testing.assert_close(influences, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def _recording(cat: Any, sizes: list[int]) -> Any:
    def recorded(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = cat(tensors, *args, **kwargs)
        if result.ndim == 2 and result.shape[0] > 4:
            sizes.append(result.numel())
        return result

    return recorded


def test_perturbation_and_defaults_go_the_general_way() -> None:
    case = build("mlp classification")
    model: InfluenceFunctionModel = arnoldi(case, 0.05).fit(case.train)
    ours = model.influences(*case.test, *case.train, mode="perturbation")
    close(ours, Reference(case).perturbation("ggn", 0.05))
    square = model.influences(*case.test)
    close(square, model.influences(*case.test, *case.test))
    close(square, square.T)
    with pytest.raises(SettingError, match="`x` must come with `y`"):
        model.influences(*case.test, y=case.train[1])
    with pytest.raises(SettingError, match="`mode` must be one of"):
        model.influences(*case.test, mode="down")
