"""What is kept beyond the matrix: what rankings are made of, and self-influences, on workers, and gone on with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client

from distinfluence import (
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    EkfacInfluence,
    LanguageModelObjective,
    SequentialInfluenceCalculator,
    open_influences,
)
from distinfluence.app.config import Job
from distinfluence.app.job import run_part
from distinfluence.errors import SettingError
from distinfluence.scaling.stages import contributions as taking_apart
from distinfluence.scaling.stages import self_influence as own_influence
from tests.influence.test_ekfac_sequences import text
from tests.reference import Reference
from tests.scaling.sources import model
from tests.test_job import content
from tests.zoo import Case, build

DAMPING = 0.01


@pytest.fixture(scope="module")
def case() -> Case:
    return build("mlp classification")


def direct(case: Case, **settings: Any) -> DirectInfluence:
    return DirectInfluence(case.model, case.loss, DAMPING, second_order_mode="ggn", **settings)


def by_layer(case: Case) -> dict[str, Any]:
    """Layer → [n_test, n_train], from dense matrices."""
    reference = Reference(case)
    factors, gradients = reference.factors("ggn", DAMPING), reference.gradients(case.train)
    found: dict[str, Any] = {}
    start = 0
    for name, parameter in case.model.named_parameters():
        columns = slice(start, start := start + parameter.numel())
        layer = name.rpartition(".")[0]
        found[layer] = found.get(layer, 0) + (factors[:, columns] @ gradients[:, columns].T).numpy()
    return found


def assert_sums(result: Any, rtol: float = 1e-5) -> None:
    for i in range(result.shape[0]):
        found = result.contributions(i)
        scale = np.abs(result[i]).max()
        for shares in (found.helpful, found.harmful):
            parts = [shares.by_block, *([] if shares.by_token is None else [shares.by_token])]
            for values in parts:
                np.testing.assert_allclose(np.nansum(values, axis=1), shares.ranking.values, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("where", ["sequential", "dask"])
def test_rankings_are_taken_apart_by_layer_whatever_the_blocks(
    request: pytest.FixtureRequest, case: Case, where: str, tmp_path: Path
) -> None:
    influence = direct(case)
    calculator: Any = SequentialInfluenceCalculator(influence)
    if where == "dask":
        calculator = DaskInfluenceCalculator(influence, request.getfixturevalue("client"))
    calculator.fit(*case.train, chunk_size=5)
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, contributions=4, progress=False)
    expected = by_layer(case)
    assert result.contribution_blocks == list(expected)
    assert result.n_contributions == 4 and not result.has_token_contributions
    for i in range(6):
        found = result.contributions(i)
        for shares, ranking in ((found.helpful, result.top(i, 4)), (found.harmful, result.bottom(i, 4))):
            assert shares.ranking.indices.tolist() == ranking.indices.tolist()
            dense = np.stack([values[i, ranking.indices] for values in expected.values()], axis=1)
            np.testing.assert_allclose(shares.by_block, dense, rtol=1e-4, atol=1e-5)
    assert_sums(result)
    assert result.provenance["summary"]["seconds"]["contributions"] > 0


def test_blocks_of_the_curvature_are_kept_where_there_are_several(case: Case, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(direct(case, block_structure="parameter_wise"))
    result = calculator.fit(*case.train).to_zarr(tmp_path / "i", *case.test, contributions=True, progress=False)
    assert result.contribution_blocks == [name for name, _ in case.model.named_parameters()]
    assert result.n_contributions == 10
    assert_sums(result)


@pytest.mark.parametrize("most", [1, 3, 64])
def test_it_does_not_matter_how_many_are_multiplied_at_once(
    case: Case, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking_apart, "MOST_TESTS", most)
    calculator = SequentialInfluenceCalculator(direct(case)).fit(*case.train, chunk_size=9)
    assert_sums(calculator.to_zarr(tmp_path / "i", *case.test, contributions=50, progress=False))


def test_sequences_are_taken_apart_by_token_too(tmp_path: Path) -> None:
    case = text(12)
    influence = EkfacInfluence(case.model, True, 0.05, loss=LanguageModelObjective())
    calculator = SequentialInfluenceCalculator(influence).fit(*case.train, chunk_size=5)
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, contributions=3, progress=False)
    assert result.has_token_contributions
    assert len(result.contribution_blocks) > 1
    assert_sums(result, 1e-4)
    fitted = EkfacInfluence(case.model, True, 0.05, loss=LanguageModelObjective()).fit(case.train)
    expected = fitted.influences_by_token(*case.test, *case.train).numpy()
    shares = result.contributions(1).harmful
    assert shares.by_token is not None
    np.testing.assert_allclose(shares.by_token, expected[1, shares.ranking.indices], rtol=1e-4, atol=1e-6)


def test_a_model_of_single_vectors_has_layers_and_no_tokens(case: Case, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(EkfacInfluence(case.model, True, 0.05)).fit(*case.train, chunk_size=9)
    result = calculator.to_zarr(tmp_path / "i", *case.test, contributions=True, self_influence=True, progress=False)
    assert not result.has_token_contributions
    assert_sums(result)
    assert np.isnan(result.self_influence_error).all() and (result.self_influence > 0).all()


def interrupting(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, place: int) -> list[int]:
    """Have the task of strip 2 fail the first time; returns the strips that were made. place: of the strip's number."""
    task, made, failing = getattr(module, name), list[int](), [2]

    def wrapped(*arguments: Any) -> Any:
        index = arguments[place]
        if index in failing:
            failing.remove(index)
            raise KeyboardInterrupt
        made.append(index)
        return task(*arguments)

    wrapped.__name__ = name
    monkeypatch.setattr(module, name, wrapped)
    return made


@pytest.mark.parametrize(
    ("module", "task", "place", "option"),
    [
        (taking_apart, "take_strip_apart", 3, {"contributions": 3}),
        (own_influence, "self_influences_of_strip", 5, {"self_influence": True}),
    ],
)
def test_a_run_that_dies_after_the_matrix_leaves_it_complete_and_goes_on_with_the_rest(
    case: Case, module: Any, task: str, place: int, option: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = interrupting(monkeypatch, module, task, place)
    calculator = SequentialInfluenceCalculator(direct(case), scratch=tmp_path / "s").fit(*case.train, chunk_size=5)
    with pytest.raises(KeyboardInterrupt):
        calculator.to_zarr(tmp_path / "i", *case.test, progress=False, **option)
    half = open_influences(tmp_path / "i")
    assert half.complete and made == [0, 1]
    result = calculator.to_zarr(tmp_path / "i", *case.test, progress=False, existing="resume", **option)
    assert made == [0, 1, 2, 3, 4]
    if "self_influence" in option:
        np.testing.assert_allclose(result.self_influence, own(case), rtol=1e-6)
    else:
        assert result.n_contributions == 3
    calculator.to_zarr(tmp_path / "i", *case.test, progress=False, existing="resume", **option)
    assert made == [0, 1, 2, 3, 4]
    assert not list((tmp_path / "s").glob("factors-*"))


def test_a_finished_result_gets_what_was_not_asked_for_at_first(case: Case, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(direct(case)).fit(*case.train, chunk_size=5)
    first = calculator.to_zarr(tmp_path / "i", *case.test, progress=False)
    assert first.contributions(0) is None and np.isnan(first.self_influence).all()
    before = first[:]
    options: Any = {"contributions": True, "self_influence": True, "existing": "resume", "progress": False}
    result = calculator.to_zarr(tmp_path / "i", *case.test, **options)
    np.testing.assert_array_equal(result[:], before)
    assert_sums(result)
    np.testing.assert_allclose(result.self_influence, own(case), rtol=1e-6)


def own(case: Case) -> Any:
    reference = Reference(case)
    matrix = reference.ggn()
    gradients = reference.gradients(case.train)
    solved = torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype), gradients.T).T
    return (solved * gradients).sum(dim=1).numpy()


METHODS: dict[str, Callable[[Case], Any]] = {
    "solve": direct,
    "quadrature": lambda case: CgInfluence(case.model, case.loss, DAMPING, rtol=1e-8, second_order_mode="ggn"),
}


@pytest.mark.parametrize("method", METHODS)
def test_self_influences_are_within_their_error(client: Client, case: Case, method: str, tmp_path: Path) -> None:
    calculator = DaskInfluenceCalculator(METHODS[method](case), client).fit(*case.train, chunk_size=9)
    result = calculator.to_zarr(tmp_path / "i.zarr", *case.test, self_influence=True, progress=False)
    expected = own(case)
    assert (np.abs(result.self_influence - expected) <= result.self_influence_error).all()
    assert (result.self_influence_error <= 1.01e-3 * expected).all()
    assert result.provenance["self_influence"]["method"] == method
    np.testing.assert_array_equal(result.points("train").self_influence(), result.self_influence)


def test_perturbation_influences_are_not_taken_apart(case: Case, tmp_path: Path) -> None:
    calculator = SequentialInfluenceCalculator(direct(case)).fit(*case.train)
    with pytest.raises(SettingError, match="of mode 'up'"):
        calculator.to_zarr(tmp_path / "i", *case.test, mode="perturbation", contributions=True, progress=False)
    with pytest.raises(SettingError, match="`contributions` must be"):
        calculator.to_zarr(tmp_path / "i", *case.test, contributions="all", progress=False)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_job_asks_for_both_also_in_parts(parts: int, tmp_path: Path) -> None:
    cut = {"train": 9, "test": 4, "panel": 4}
    job = Job.parse(content(contributions=3, self_influence=True, chunks=cut), tmp_path)
    for part in range(parts):
        result = run_part(job, f"{part}/{parts}")
    assert result.complete and result.n_contributions == 3
    assert_sums(result, 1e-4)
    assert np.isfinite(result.self_influence).all()
    assert result.contribution_blocks == list(
        dict.fromkeys(n.rpartition(".")[0] for n, _ in model().named_parameters())
    )
