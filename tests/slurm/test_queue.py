"""What queues do to jobs by themselves: time limits, jobs that are pushed aside, as many as there is work for."""

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
    hurry,
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

OVER = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT"}  # States of a job that has ended.


@pytest.mark.parametrize(
    ("walltime", "seconds"),
    [
        ("00:00:30", 6.0),  # Workers leave after about 17 seconds. SLURM rounds the limit up to a minute.
        pytest.param("00:02:00", 10.0, marks=pytest.mark.soak),  # Workers leave after about 70 seconds.
    ],
)
def test_workers_that_leave_before_their_limit_are_replaced_and_lose_nothing(
    slurm: SlurmHost, tmp_path: Path, walltime: str, seconds: float
) -> None:
    ended = states_of_limited(slurm, tmp_path, seconds, walltime=walltime)
    assert "TIMEOUT" not in ended


def test_a_time_limit_shorter_than_the_run_loses_nothing(slurm: SlurmHost, tmp_path: Path) -> None:
    """SLURM ends a job of one minute at its next look, after about 70 seconds."""
    ended = states_of_limited(slurm, tmp_path, 10.0, walltime="1", worker_extra_args=["--lifetime", "1h"])
    assert "TIMEOUT" in ended


def states_of_limited(slurm: SlurmHost, folder: Path, seconds: float, **settings: object) -> list[str]:
    """How the jobs of a run ended that lost nothing, although none of its workers could stay to its end."""
    known = set(states(slurm))
    job, result = slow_job(folder, seconds, chunks={"train": 1, "test": 6, "panel": 6}), folder / "influences.zarr"
    with running(slurm, "run", job, "--cluster", cluster_file(folder, **settings)) as process:
        seen: set[tuple[str, int]] = set()

        def first_are_over() -> bool:
            seen.update(marks(result).items())
            return sum(state in OVER for number, state in states(slurm).items() if number not in known) > 1

        wait_for(first_are_over, "the end of the first two jobs", process)
        hurry(job)
        seen |= all_marks(process, result)
        end_of(process)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    ended = [state for number, state in states(slurm).items() if number not in known]
    assert len(ended) > 2  # some were replaced
    assert_right(result)
    # what was made twice was in the making when its worker went, one strip for each that did
    assert len(seen) - STRIPS <= len(ended) - 2
    return ended


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
        hurry(job)
        assert len(set(jobs_in(slurm, "RUNNING,PENDING")) - {urgent}) <= 3
        end_of(process)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    assert on_n1
    assert {states(slurm)[number] for number in on_n1} == {"CANCELLED"}  # not left to run beside their replacements
    assert made_once(before, result)
    assert_right(result)
