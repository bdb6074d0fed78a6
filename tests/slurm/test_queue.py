"""What queues do to jobs by themselves: time limits, jobs that are pushed aside, as many as there is work for."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import (
    STRIPS,
    all_marks,
    assert_right,
    cluster_file,
    end_of,
    jobs_in,
    made_once,
    marks,
    running,
    sbatch,
    shipped,
    slow_job,
    states,
    strips_done,
    wait_for,
)

pytestmark = pytest.mark.slurm

# both give a worker about 70 seconds: SLURM ends a job of one minute at its next look, and workers leave one of two
# minutes in good time
LIMITS: dict[str, dict[str, object]] = {
    "leave": {"walltime": "2"},
    "killed": {"walltime": "1", "worker_extra_args": ["--lifetime", "1h"]},
}


def test_a_time_limit_shorter_than_the_run_loses_nothing_whether_workers_leave_before_it_or_are_killed(
    slurm: SlurmHost, tmp_path: Path
) -> None:
    known = set(states(slurm))
    seen: dict[str, set[tuple[str, int]]] = {}
    with ExitStack() as stack:
        processes = {}
        for name, settings in LIMITS.items():
            job = slow_job(tmp_path / name, 7, chunks={"train": 1, "test": 6, "panel": 6})
            cluster = cluster_file(tmp_path / name, job_name=name, **settings)
            processes[name] = stack.enter_context(running(slurm, "run", job, "--cluster", cluster))
        for name, process in processes.items():
            seen[name] = all_marks(process, tmp_path / name / "influences.zarr")
            end_of(process)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    ended: dict[str, list[str]] = {"leave": [], "killed": []}
    for line in slurm("squeue", "-h", "--states=all", "-o", "%A %j %T").splitlines():
        number, job_name, state = line.split()
        if number not in known:
            ended[job_name.partition("-")[0]].append(state)
    assert "TIMEOUT" in ended["killed"]
    assert "TIMEOUT" not in ended["leave"]
    for name, jobs in ended.items():
        assert len(jobs) > 2, name  # some were replaced
        assert_right(tmp_path / name / "influences.zarr")
        # what was made twice was in the making when its worker went, one strip for each that did
        assert len(seen[name]) - STRIPS <= len(jobs) - 2, name


def test_jobs_that_are_pushed_aside_are_replaced_and_there_are_as_many_as_there_is_work_for(
    slurm: SlurmHost, tmp_path: Path
) -> None:
    job, result = slow_job(tmp_path, 2), tmp_path / "influences.zarr"
    # the file as it is shipped, but for what these nodes have
    cluster = shipped(tmp_path, "spot.yaml", keys={"workers": 3, "minimum": 1}, cores=1, memory="2GB")
    with running(slurm, "run", job, "--cluster", cluster) as process:
        wait_for(lambda: len(jobs_in(slurm, "RUNNING")) == 3, "as many as allowed", process)
        wait_for(lambda: strips_done(result) > 0, "strips", process)
        on_n1 = slurm("squeue", "-h", "-t", "RUNNING", "-w", "n1", "-o", "%A").split()
        before = marks(result)
        # a whole node, at once
        urgent = sbatch(slurm, tmp_path, "-p", "urgent", "-w", "n1", "-c", 8, "-o", "/dev/null", "--wrap", "sleep 5")
        wait_for(lambda: urgent in jobs_in(slurm, "RUNNING"), "the urgent job", process)
        wait_for(lambda: not set(on_n1) & set(jobs_in(slurm, "RUNNING")), "the end of those in its way", process)
        assert len(set(jobs_in(slurm, "RUNNING,PENDING")) - {urgent}) <= 3
        end_of(process)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    assert on_n1
    assert {states(slurm)[number] for number in on_n1} == {"CANCELLED"}  # not left to run beside their replacements
    assert made_once(before, result)
    assert_right(result)
