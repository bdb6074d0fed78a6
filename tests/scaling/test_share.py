"""Processes that share one result: each makes its strips, together the matrix. At the same time: tests/slurm."""

from pathlib import Path

import numpy as np
import pytest

from distinfluence import open_influences
from distinfluence.app.config import Job
from distinfluence.app.job import run_part
from distinfluence.errors import ConfigError, SettingError
from distinfluence.scaling import Progress
from distinfluence.scaling.partition import Partition
from tests.reference import Reference
from tests.test_cli import command, job_file
from tests.test_job import content
from tests.zoo import build

CHUNKS = {"train": 3, "test": 2, "panel": 6}
SILENT = Progress(show=False)


def expected() -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
    values = Reference(build("mlp classification")).influences("hessian", 0.01).numpy()
    return values


def test_every_strip_is_the_part_of_exactly_one(tmp_path: Path) -> None:
    shares = [Partition(part, 3, tmp_path) for part in range(3)]
    assert sorted(strip for share in shares for strip in share.of(range(10))) == list(range(10))
    assert [share.turned(range(6))[0] for share in shares] == [0, 2, 4]
    assert all(sorted(share.turned(range(7))) == list(range(7)) for share in shares)


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/0", ""])
def test_a_part_that_is_none_says_how_to_write_one(text: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="K/N"):
        Partition.parse(text, tmp_path)


def test_parts_in_any_order_make_the_matrix_and_the_last_one_finishes_it(tmp_path: Path) -> None:
    job = Job.parse(content(chunks=CHUNKS), tmp_path)
    for part in ("2/3", "0/3"):
        assert not run_part(job, part, progress=SILENT).complete
    assert open_influences(tmp_path / "influences.zarr").n_missing == 3  # strips 1, 4 and 7 of eight
    result = run_part(job, "1/3", progress=SILENT)
    assert result.complete
    np.testing.assert_allclose(result[:], expected(), rtol=1e-6, atol=1e-4)
    assert result.converged.all()
    assert not (tmp_path / ".influences.zarr.scratch").exists()
    assert run_part(job, "0/3", progress=SILENT).complete  # again: nothing to do


def test_what_would_not_fit_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`chunks` must say"):
        run_part(Job.parse(content(), tmp_path), "0/2", progress=SILENT)
    outcome = command("run", job_file(tmp_path, chunks=CHUNKS), "--part", "0/2", "--overwrite")
    assert outcome.exit_code == 2
    assert "--part goes on with what is there" in outcome.output
