"""Whole runs over worker jobs: the result is the local one, whatever happens to the jobs, and none of them is left."""

from pathlib import Path

import pytest

from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import (
    STRIPS,
    assert_right,
    cluster_file,
    end_of,
    hurry,
    jobs_in,
    made_once,
    marks,
    run_to_its_end,
    running,
    shipped,
    slow_job,
    states,
    strips_done,
    wait_for,
)

pytestmark = pytest.mark.slurm


def test_jobs_that_are_cancelled_or_requeued_are_replaced(slurm: SlurmHost, tmp_path: Path) -> None:
    job, result = slow_job(tmp_path, 1.5), tmp_path / "influences.zarr"
    # two processes in each job: Dask would not replace such a job at all
    cluster = cluster_file(tmp_path, cores=2, processes=2)
    with running(slurm, "run", job, "--cluster", cluster) as process:
        wait_for(lambda: strips_done(result) > 0, "the first strip", process)
        old = cancelled, requeued = wait_for(lambda: two(jobs_in(slurm, "RUNNING")), "two jobs", process)
        before = marks(result)
        slurm("scancel", cancelled)
        slurm("scontrol", "requeue", requeued)
        wait_for(lambda: two(sorted(set(jobs_in(slurm, "RUNNING")) - set(old))), "two replacements", process)
        hurry(job)
        end_of(process)
    assert 0 < len(before) < STRIPS
    assert made_once(before, result)
    assert_right(result)
    assert queue(slurm) == []
    assert states(slurm)[requeued] == "CANCELLED"  # not left to run beside its replacement


def is_up(slurm: SlurmHost, node: str) -> bool:
    """Whether the node takes jobs, told to if not: one that registers meanwhile has come back by itself."""
    if not slurm.node_states()[node].startswith(("down", "drain", "drng")):
        return True
    slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    return False


def test_a_worker_that_ends_by_itself_and_a_node_that_dies_are_made_up_for(slurm: SlurmHost, tmp_path: Path) -> None:
    job, result = slow_job(tmp_path, 1.5), tmp_path / "influences.zarr"
    try:
        with running(slurm, "run", job, "--cluster", cluster_file(tmp_path)) as process:
            wait_for(lambda: strips_done(result) > 0, "the first strip", process)
            on_n1 = slurm("squeue", "-h", "-t", "RUNNING", "-w", "n1", "-o", "%A").split()
            before = marks(result)
            slurm.crash_node("n2")
            # SLURM would see that by itself, half a minute later
            slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
            slurm("scancel", "--batch", "--signal=TERM", *on_n1)  # to the worker itself, which ends in good order
            wait_for(lambda: len(set(jobs_in(slurm, "RUNNING")) - set(on_n1)) == 2, "two replacements", process)
            slurm.start_node("n2")
            wait_for(lambda: is_up(slurm, "n2"), "the node", process)
            hurry(job)
            end_of(process)
    finally:
        slurm.start_node("n2")  # if it is not there yet
        wait_for(lambda: is_up(slurm, "n2"), "the node")
    assert on_n1
    assert made_once(before, result)
    assert_right(result)
    assert queue(slurm) == []


def test_each_worker_sees_the_gpu_that_it_was_granted(slurm: SlurmHost, tmp_path: Path) -> None:
    log = tmp_path / "devices"
    job = slow_job(tmp_path, log=str(log))
    own = {"job-extra-directives": ["--gres=gpu:1", "--nodelist=n1"]}
    cluster = shipped(tmp_path, "gpu.yaml", keys={"workers": 2}, cores=1, memory="2GB", **own)
    done = run_to_its_end(slurm, "run", job, "--cluster", cluster, "--quiet")
    assert done.returncode == 0, done.stderr
    seen = {tuple(line.split()) for line in log.read_text().splitlines()}
    assert {devices for node, devices in seen if node == "n1"} == {"0", "1"}


def two(jobs: list[str]) -> list[str]:
    return jobs if len(jobs) == 2 else []
