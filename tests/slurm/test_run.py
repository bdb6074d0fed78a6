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
    is_complete,
    jobs_in,
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
    with running(slurm, "run", job, "--cluster", cluster_file(tmp_path)) as process:
        wait_for(lambda: strips_done(result) > 0, "the first strip", process)
        cancelled, requeued = wait_for(lambda: two(jobs_in(slurm, "RUNNING")), "two jobs", process)
        slurm("scancel", cancelled)
        slurm("scontrol", "requeue", requeued)
        done = strips_done(result)
        fresh = wait_for(
            lambda: two(sorted(set(jobs_in(slurm, "RUNNING")) - {cancelled, requeued})), "two replacements", process
        )
        assert done < STRIPS
        end_of(process)
    assert is_complete(result)
    assert queue(slurm) == []
    assert states(slurm)[requeued] == "CANCELLED"  # not left to come back, or to run beside its replacement
    assert len(fresh) == 2


def two(jobs: list[str]) -> list[str]:
    return jobs if len(jobs) == 2 else []
