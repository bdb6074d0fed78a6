"""The scripts of deploy/slurm, submitted as they are, and what becomes of them when the queue interferes."""

import shlex
from pathlib import Path

import pytest

from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import (
    STRIPS,
    assert_right,
    cluster_file,
    command,
    hurry,
    is_back,
    jobs_in,
    log_of,
    made_once,
    marks,
    sbatch,
    slow_job,
    states,
    strips_done,
    submitted,
    wait_for,
)

pytestmark = pytest.mark.slurm


def test_a_driver_job_goes_on_where_it_stopped_at_its_limit_and_when_it_is_requeued(
    slurm: SlurmHost, tmp_path: Path
) -> None:
    job, result = slow_job(tmp_path, 1.5), tmp_path / "influences.zarr"
    number = submitted(slurm, tmp_path, "driver.sbatch", job, cluster_file(tmp_path))
    wait_for(lambda: strips_done(result) > 0, "strips")
    first = set(jobs_in(slurm, "RUNNING")) - {number}
    slurm("scancel", "--batch", "--signal=USR1", number)  # as --signal=B:USR1@180 does
    wait_for(lambda: "requeueing job" in log_of(tmp_path, number), "the requeue")
    assert "stopped; what was written stays" in log_of(tmp_path, number)
    before = marks(result)
    # only these say that it is under way again: the first ones may end a strip after the requeue
    second = wait_for(lambda: set(jobs_in(slurm, "RUNNING")) - first - {number}, "workers of the second start")
    now = strips_done(result)
    wait_for(lambda: strips_done(result) > now, "more strips")
    slurm("scontrol", "requeue", number)
    wait_for(lambda: is_back(slurm, number, 2), "its place in the queue")
    hurry(job)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    assert states(slurm)[number] == "COMPLETED", log_of(tmp_path, number)
    assert made_once(before, result)
    assert_right(result)
    assert first and second
    assert {states(slurm)[worker] for worker in first | second} == {"CANCELLED"}


def test_a_driver_job_that_is_cancelled_does_not_come_back_and_takes_its_workers_along(
    slurm: SlurmHost, tmp_path: Path
) -> None:
    job, result = slow_job(tmp_path), tmp_path / "influences.zarr"
    # more workers than there is room for: two of them are still waiting
    cluster = cluster_file(tmp_path, workers=4, cores=4, job_extra_directives=["--nodelist=n1"])
    number = submitted(slurm, tmp_path, "driver.sbatch", job, cluster, options=("--nodelist=n2",))
    wait_for(lambda: strips_done(result) > 0, "strips")
    wait_for(lambda: len(jobs_in(slurm, "PENDING")) == 2, "the two jobs that find no room")
    slurm("scancel", number)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    found = states(slurm)
    assert found[number] == "CANCELLED", log_of(tmp_path, number)
    assert "requeueing" not in log_of(tmp_path, number)
    assert {state for other, state in found.items() if int(other) > int(number)} == {"CANCELLED"}
    assert strips_done(result) < STRIPS


def test_a_run_in_a_job_that_is_requeued_goes_on_by_itself_and_an_array_makes_up_for_a_killed_element(
    slurm: SlurmHost, tmp_path: Path
) -> None:
    # two jobs of their own, side by side
    plain, shared = slow_job(tmp_path / "plain", 1), slow_job(tmp_path / "shared", 3)
    begun, result = plain.parent / "influences.zarr", shared.parent / "influences.zarr"
    array = ("--array=0-2", "--cpus-per-task=1", "--mem=2G")
    elements = submitted(slurm, shared.parent, "array.sbatch", shared, options=array)
    number = sbatch(slurm, plain.parent, "--wrap", shlex.join(command("run", plain)), "--mem=4G", "-o", "log")

    wait_for(lambda: strips_done(result) > 0, "strips of the array")
    slurm("scancel", "--signal=KILL", "--full", f"{elements}_1")
    wait_for(lambda: f"{elements}_1" not in slurm("squeue", "-h", "-o", "%F_%K").split(), "the end of the element")
    hurry(shared)
    wait_for(lambda: strips_done(begun) > 0, "strips of the plain run")
    first = marks(begun)
    slurm("scontrol", "requeue", number)
    wait_for(lambda: is_back(slurm, number, 1), "its place in the queue")
    hurry(plain)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")

    log = (plain.parent / "log").read_text()
    assert states(slurm)[number] == "COMPLETED", log
    assert 0 < len(first) < STRIPS
    assert made_once(first, begun)
    assert_right(begun)

    before = marks(result)
    assert len(before) < STRIPS
    assert {"0", "2"} <= {str(int(name) % 3) for name in before}
    submitted(slurm, shared.parent, "array.sbatch", shared, options=array)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    assert made_once(before, result)
    assert_right(result)
    assert not (shared.parent / ".influences.zarr.scratch").exists()
