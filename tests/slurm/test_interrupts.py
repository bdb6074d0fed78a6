"""The end of a run before its time, while some of its jobs have not even started: none of them outlives it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import (
    SECONDS,
    STRIPS,
    assert_right,
    cluster_file,
    end_of,
    hurry,
    jobs_in,
    made_once,
    marks,
    running,
    slow_job,
    states,
    strips_done,
    wait_for,
)

pytestmark = pytest.mark.slurm

# jobs of half a node each, all on one node: two run, the others wait
CROWDED = {"cores": 4, "job_extra_directives": ["--nodelist=n1"]}


def interrupted(slurm: SlurmHost, signum: signal.Signals, result: Path, *arguments: object) -> dict[str, int]:
    """The marks of a run that was sent a signal when it had made some strips, and left nothing in the queue."""
    before = strips_done(result)
    with running(slurm, *arguments) as process:
        wait_for(lambda: strips_done(result) > before, "more strips", process)
        wait_for(lambda: len(jobs_in(slurm, "PENDING")) == 2, "the two jobs that find no room", process)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, output
    assert "stopped; what was written stays. Go on with: distinfluence run" in output
    assert "Traceback" not in output
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")
    return marks(result)


def test_sigterm_and_ctrl_c_cancel_waiting_jobs_too_and_the_result_is_resumed(slurm: SlurmHost, tmp_path: Path) -> None:
    job, result = slow_job(tmp_path, 2), tmp_path / "influences.zarr"  # enough work is left for all jobs each time
    cluster = cluster_file(tmp_path, workers=4, **CROWDED)
    before: dict[str, int] = {}
    for signum in (signal.SIGTERM, signal.SIGINT):
        after = interrupted(slurm, signum, result, "run", job, "--cluster", cluster, "--resume")
        assert before.items() <= after.items()
        assert len(before) < len(after) < STRIPS
        before = after
    hurry(job)
    with running(slurm, "run", job, "--cluster", cluster_file(tmp_path), "--resume") as process:
        end_of(process)
    assert made_once(before, result)
    assert_right(result)


def test_the_jobs_of_a_driver_that_was_killed_are_cancelled_or_left_as_the_cluster_file_says(
    slurm: SlurmHost, tmp_path: Path
) -> None:
    with started(slurm, tmp_path, "cancel", "n1") as cancelled, started(slurm, tmp_path, "leave", "n2") as left:
        pass  # both drivers are killed
    wait_for(lambda: {states(slurm)[number] for number in cancelled} == {"CANCELLED"}, "the end of its jobs")
    assert set(jobs_in(slurm, "PENDING")) & left
    slurm("scancel", *left)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")


@contextmanager
def started(slurm: SlurmHost, folder: Path, on_death: str, node: str) -> Iterator[set[str]]:
    """The jobs of a run, one more than there is room for; its driver is killed at the end."""
    before = set(states(slurm))
    settings = {**CROWDED, "job_extra_directives": [f"--nodelist={node}"]}
    job = slow_job(folder / on_death, 5)
    cluster = cluster_file(folder / on_death, workers=3, keys={"on_death": on_death}, **settings)
    with running(slurm, "run", job, "--cluster", cluster) as process:
        jobs = wait_for(lambda: three(set(states(slurm)) - before), "three jobs", process)
        yield jobs
        assert process.poll() is None, process.communicate()[0]
        process.kill()


def three(jobs: set[str]) -> set[str]:
    return jobs if len(jobs) == 3 else set()
