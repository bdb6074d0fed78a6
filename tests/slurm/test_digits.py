"""The digits, by every way in which a run gets to the queue: the result is the local one, and no job is left."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distinfluence import open_influences
from distinfluence.app.demo import job_content, train_model
from tests.processes import finished
from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import (
    REAL,
    cluster_file,
    command,
    end_of,
    environment,
    log_of,
    running,
    shipped,
    states,
    submitted,
    wait_for,
    written,
)

pytestmark = pytest.mark.slurm


def test_the_digits_by_each_way_through_the_queue_give_the_local_result_bit_for_bit(
    slurm: SlurmHost, tmp_path: Path
) -> None:
    torch.save(train_model().state_dict(), tmp_path / "model.pt")
    data = {"train": "distinfluence.app.demo:train_data", "test": "tests.slurm.sources:some_digits"}
    digits = {**job_content(1), "data": data, "solve": "rows", "chunks": {"train": 250, "test": 15, "panel": 60}}
    jobs = {}
    for name in ("local", "run", "driver", "allocation", "array"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "model.pt", tmp_path / name)
        jobs[name] = written(tmp_path / name / "job.yaml", digits)
    # as a worker with one core: one thread, and so the same order of every sum
    finished(
        command("run", jobs["local"], "--quiet"),
        env=environment(slurm, REAL),
        check=True,
        limit=350,  # it shares its core with other tests
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )
    allocation = submitted(
        slurm, tmp_path / "allocation", "allocation.sbatch", jobs["allocation"], options=("-n", 2, "-c", 1)
    )
    array = submitted(
        slurm, tmp_path / "array", "array.sbatch", jobs["array"], options=("--array=0-1", "-c", 1, "--mem=2G")
    )
    driver = submitted(slurm, tmp_path / "driver", "driver.sbatch", jobs["driver"], cluster_file(tmp_path / "driver"))
    workers = shipped(tmp_path, "cpu.yaml", keys={"workers": 4}, cores=1, memory="2GB")
    with running(slurm, "run", jobs["run"], "--cluster", workers, path=REAL) as process:
        assert "waiting for workers, 4 jobs" in end_of(process)
    wait_for(lambda: queue(slurm) == [], "the end of all jobs")

    ended = states(slurm)
    for name, number in (("driver", driver), ("allocation", allocation), ("array", array)):
        assert ended[number] == "COMPLETED", log_of(tmp_path / name, number)
    expected = open_influences(tmp_path / "local" / "influences.zarr")
    for name in ("run", "driver", "allocation", "array"):
        found = open_influences(tmp_path / name / "influences.zarr")
        np.testing.assert_array_equal(found[:], expected[:], err_msg=name)
        np.testing.assert_array_equal(found.top(0, 5).indices, expected.top(0, 5).indices, err_msg=name)
    assert len(list((tmp_path / "run" / "influences.zarr.logs").glob("*.err"))) == 4  # a log for each job
    assert not list((tmp_path / "allocation").glob(".influences*"))
    assert not list((tmp_path / "array").glob(".influences*"))
