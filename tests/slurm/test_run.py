"""Whole runs over worker jobs: the result is the local one, whatever happens to the jobs, and none of them is left."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from distinfluence import open_influences
from distinfluence.demo import job_content, train_model
from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import (
    STRIPS,
    cluster_file,
    command,
    end_of,
    environment,
    finished,
    jobs_in,
    made_once,
    marks,
    running,
    slow_job,
    states,
    strips_done,
    wait_for,
    written,
)

pytestmark = pytest.mark.slurm


def test_the_digits_on_four_jobs_give_the_local_result_bit_for_bit(slurm: SlurmHost, tmp_path: Path) -> None:
    torch.save(train_model().state_dict(), tmp_path / "model.pt")
    digits = {**job_content(1), "solve": "rows", "chunks": {"train": 250, "test": 75}}
    local = written(tmp_path / "local.yaml", {**digits, "output": "local.zarr"})
    # as a worker job with one core: one thread, and so the same order of every sum
    one_core = command("run", local, "--quiet")
    subprocess.run(
        one_core,
        env=environment(slurm),
        check=True,
        capture_output=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )
    job = written(tmp_path / "job.yaml", digits)
    done = finished(slurm, "run", job, "--cluster", cluster_file(tmp_path, workers=4))
    assert done.returncode == 0, done.stderr
    assert "waiting for workers, 4 jobs" in done.stderr
    assert queue(slurm) == []
    ours, theirs = open_influences(tmp_path / "influences.zarr"), open_influences(tmp_path / "local.zarr")
    np.testing.assert_array_equal(ours[:], theirs[:])
    np.testing.assert_array_equal(ours.top(0, 5).indices, theirs.top(0, 5).indices)
    assert len(list((tmp_path / "influences.zarr.logs").glob("*.err"))) == 4  # a log for each job


def test_jobs_that_are_cancelled_or_requeued_are_replaced(slurm: SlurmHost, tmp_path: Path) -> None:
    job, result = slow_job(tmp_path), tmp_path / "influences.zarr"
    # two processes in each job: Dask would not replace such a job at all
    cluster = cluster_file(tmp_path, cores=2, processes=2)
    with running(slurm, "run", job, "--cluster", cluster) as process:
        wait_for(lambda: strips_done(result) > 0, "the first strip", process)
        old = cancelled, requeued = wait_for(lambda: two(jobs_in(slurm, "RUNNING")), "two jobs", process)
        before = marks(result)
        slurm("scancel", cancelled)
        slurm("scontrol", "requeue", requeued)
        wait_for(lambda: two(sorted(set(jobs_in(slurm, "RUNNING")) - set(old))), "two replacements", process)
        end_of(process)
    assert 0 < len(before) < STRIPS
    assert made_once(before, result)
    assert queue(slurm) == []
    assert states(slurm)[requeued] == "CANCELLED"  # not left to run beside its replacement


def is_up(slurm: SlurmHost, node: str) -> bool:
    """Whether the node takes jobs, told to if not: one that registers meanwhile has come back by itself."""
    if not slurm.node_states()[node].startswith(("down", "drain", "drng")):
        return True
    slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    return False


def test_a_worker_that_ends_by_itself_and_a_node_that_goes_are_made_up_for(slurm: SlurmHost, tmp_path: Path) -> None:
    job, result = slow_job(tmp_path), tmp_path / "influences.zarr"
    try:
        with running(slurm, "run", job, "--cluster", cluster_file(tmp_path)) as process:
            wait_for(lambda: strips_done(result) > 0, "the first strip", process)
            on_n1 = slurm("squeue", "-h", "-t", "RUNNING", "-w", "n1", "-o", "%A").split()
            before = marks(result)
            slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
            slurm("scancel", "--batch", "--signal=TERM", *on_n1)  # to the worker itself, which ends in good order
            wait_for(lambda: len(set(jobs_in(slurm, "RUNNING")) - set(on_n1)) == 2, "two replacements", process)
            wait_for(lambda: is_up(slurm, "n2"), "the node", process)
            end_of(process)
    finally:
        wait_for(lambda: is_up(slurm, "n2"), "the node")
    assert on_n1
    assert made_once(before, result)
    assert queue(slurm) == []


def test_each_worker_sees_the_gpu_that_it_was_granted(slurm: SlurmHost, tmp_path: Path) -> None:
    log = tmp_path / "devices"
    factory = {"target": "tests.scaling.sources:model_beside_gpus", "arguments": {"log": str(log)}}
    job = slow_job(tmp_path, model={"factory": factory})
    cluster = cluster_file(
        tmp_path,
        queue="gpu",
        job_extra_directives=["--gres=gpu:1", "--nodelist=n1"],
        worker_extra_args=["--resources", "GPU=1"],
    )
    done = finished(slurm, "run", job, "--cluster", cluster, "--quiet")
    assert done.returncode == 0, done.stderr
    seen = {tuple(line.split()) for line in log.read_text().splitlines()}
    assert {devices for node, devices in seen if node == "n1"} == {"0", "1"}


def two(jobs: list[str]) -> list[str]:
    return jobs if len(jobs) == 2 else []
