"""Verification finds out whether influences are what they claim to be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from distinfluence import CgInfluence, DirectInfluence, KrylovInfluence, open_influences
from distinfluence.errors import ShapeError
from distinfluence.evaluate import verify
from tests.reference import Reference
from tests.test_cli import command, job_file
from tests.zoo import build


@pytest.mark.parametrize(
    ("method", "other"), [(DirectInfluence, "BlockKrylov"), (CgInfluence, "Direct"), (KrylovInfluence, "Direct")]
)
def test_influences_agree_with_another_method(method: Any, other: str) -> None:
    case = build("mlp classification")
    model = method(case.model, case.loss, 0.02, second_order_mode="ggn").fit(case.train)
    factors, report = model.influence_factors(*case.test, return_report=True)
    scores = model.influences_from_factors(factors, *case.train)
    found = verify(scores, model, case.test, case.train, n_test=3, n_train=10, error_bound=report.error_bound)
    assert found.method == other
    assert found.given.shape == found.exact.shape == found.bound.shape == (3, 10)
    expected = Reference(case).influences("ggn", 0.02).numpy()[np.ix_(found.test, found.train)]
    np.testing.assert_allclose(found.exact, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    assert found.relative_error < 1e-5
    assert found.within_bounds
    assert found.converged
    assert "all within their bounds" in str(found)


def test_a_wrong_influence_is_found() -> None:
    case = build("mlp classification")
    model = CgInfluence(case.model, case.loss, 0.02, second_order_mode="ggn").fit(case.train)
    factors, report = model.influence_factors(*case.test, return_report=True)
    scores = model.influences_from_factors(factors, *case.train)
    scores[2, 5] += 1e-3 * float(scores.abs().max())
    found = verify(scores, model, case.test, case.train, n_test=99, n_train=99, error_bound=report.error_bound)
    assert found.given.shape == (6, 23)
    assert found.within_bounds is False
    assert "NOT within" in str(found)
    assert verify(scores, model, case.test, case.train).within_bounds is None
    with pytest.raises(ShapeError, match=r"`influences` must be \[6, 23\]"):
        verify(scores[:2], model, case.test, case.train)


def test_a_float32_model_is_verified_in_float64_and_by_block() -> None:
    case = build("mlp classification")
    x, y = case.train
    train, test = (x.float(), y), (case.test[0].float(), case.test[1])
    model = CgInfluence(
        case.model.float(), case.loss, 0.02, rtol=1e-3, second_order_mode="ggn", block_structure="layer_wise"
    ).fit(train)
    found = verify(model.influences(*test, *train), model, test, train)
    assert 1e-9 < found.relative_error < 1e-2
    assert found.exact.dtype == np.float64


@pytest.mark.parametrize(
    "method",
    [
        {"name": "cg", "second_order_mode": "ggn"},
        {"name": "direct", "second_order_mode": "ggn"},
        {"name": "ekfac", "update_diagonal": True, "cg_iterations": 200},
    ],
    ids=lambda method: method["name"],
)
def test_a_finished_job_is_verified_from_the_shell(method: dict[str, Any], tmp_path: Path) -> None:
    settings = {**method, "hessian_regularization": 0.01}
    job = job_file(tmp_path, method=settings, chunks={"train": 7, "test": 4})
    assert command("run", job, "--quiet").exit_code == 0
    result = command("verify", job, "--tests", 3, "--trains", 9)
    assert result.exit_code == 0, result.output
    assert "3 × 9 influences" in result.output
    assert "all within their bounds" in result.output
    group = zarr.open_group(str(tmp_path / "influences.zarr"), mode="r+")
    values = group["influences"]
    values[:] = 1.01 * np.asarray(values[:])
    result = command("verify", job)
    assert result.exit_code == 1
    assert "NOT within their bounds" in result.output


def test_a_result_of_another_model_is_not_verified(tmp_path: Path) -> None:
    job = job_file(tmp_path)
    assert command("run", job, "--quiet").exit_code == 0
    torch.save(build("mlp classification", seed=1).model.state_dict(), tmp_path / "other.pt")
    other = job_file(tmp_path, model={"factory": "tests.scaling.sources:model", "checkpoint": "other.pt"})
    result = command("verify", other)
    assert result.exit_code == 1
    assert "was made with other parameters" in result.output


def test_a_damaged_result_is_not_verified_and_a_run_mends_it_alone(tmp_path: Path) -> None:
    job = job_file(tmp_path, method={"name": "direct", "hessian_regularization": 0.01}, chunks={"train": 7, "test": 4})
    assert command("run", job, "--quiet").exit_code == 0
    output = tmp_path / "influences.zarr"
    before = open_influences(output)[:]
    for file in (output / "influences" / "c" / "0" / "1", output / "iterations" / "c" / "0"):
        content = bytearray(file.read_bytes())
        content[0] ^= 1
        file.write_bytes(content)
    marked = {i: (output / "strip_status" / "c" / str(i)).stat().st_mtime_ns for i in range(4)}
    result = command("verify", job)
    assert result.exit_code == 1
    assert "damaged: strips 1 and `iterations`. `run --resume --check` makes that again" in result.output
    assert command("run", job, "--check").exit_code == 2
    mended = command("run", job, "--resume", "--check")
    assert mended.exit_code == 0, mended.output
    assert "strips 1 and `iterations` of" in mended.output
    result = command("verify", job, "--tests", 2, "--trains", 3)
    assert result.exit_code == 0, result.output
    assert "every byte as it was written" in result.output
    np.testing.assert_array_equal(open_influences(output)[:], before)
    now = {i: (output / "strip_status" / "c" / str(i)).stat().st_mtime_ns for i in range(4)}
    assert [i for i in range(4) if now[i] != marked[i]] == [1]
