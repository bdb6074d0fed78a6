"""The scripts of deploy/slurm, submitted as they are."""

from pathlib import Path

import numpy as np
import pytest

from distinfluence import open_influences
from tests.reference import Reference
from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import (
    cluster_file,
    jobs_in,
    log_of,
    made_once,
    marks,
    slow_job,
    states,
    strips_done,
    submitted,
    wait_for,
)
from tests.zoo import build

pytestmark = pytest.mark.slurm


def test_a_driver_job_goes_on_where_it_stopped_at_its_limit_and_when_it_is_requeued(
    slurm: SlurmHost, tmp_path: Path
) -> None:
    job, result = slow_job(tmp_path), tmp_path / "influences.zarr"
    number = submitted(slurm, tmp_path, "driver.sbatch", job, cluster_file(tmp_path))
    wait_for(lambda: strips_done(result) > 0, "strips")
    first = set(jobs_in(slurm, "RUNNING")) - {number}
    slurm("scancel", "--batch", "--signal=TERM", number)  # as --signal=B:TERM@180 does
    wait_for(lambda: "requeueing job" in log_of(tmp_path, number), "the requeue")
    assert "stopped; what was written stays" in log_of(tmp_path, number)
    before = marks(result)
    wait_for(lambda: strips_done(result) > len(before), "more strips")
    second = set(jobs_in(slurm, "RUNNING")) - {number}
    slurm("scontrol", "requeue", number)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    assert states(slurm)[number] == "COMPLETED", log_of(tmp_path, number)
    assert made_once(before, result)
    assert first and second
    assert {states(slurm)[worker] for worker in first | second} == {"CANCELLED"}


def test_one_allocation_with_a_scheduler_file_holds_everything(slurm: SlurmHost, tmp_path: Path) -> None:
    options = ("--ntasks=2", "--cpus-per-task=1")
    number = submitted(slurm, tmp_path, "allocation.sbatch", slow_job(tmp_path), options=options)
    wait_for(lambda: queue(slurm) == [], "the end of the job")
    assert states(slurm)[number] == "COMPLETED", log_of(tmp_path, number)
    assert open_influences(tmp_path / "influences.zarr").complete
    assert not list(tmp_path.glob(".influences-*"))


def test_an_array_of_jobs_makes_one_matrix(slurm: SlurmHost, tmp_path: Path) -> None:
    job = slow_job(tmp_path, chunks={"train": 1, "test": 2, "panel": 6})
    submitted(slurm, tmp_path, "array.sbatch", job, options=("--array=0-2", "--cpus-per-task=1", "--mem=2G"))
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    logs = "".join(log.read_text() for log in tmp_path.glob("influences-*.log"))
    result = open_influences(tmp_path / "influences.zarr")
    assert result.complete, logs
    expected = Reference(build("mlp classification")).influences("hessian", 0.01).numpy()
    np.testing.assert_allclose(result[:], expected, rtol=1e-6, atol=1e-4)  # stored in float32
    assert np.isfinite(result.relative_residual).all()
    assert not (tmp_path / ".influences.zarr.scratch").exists()
