"""The SLURM that the other tests run on is a real one, and leaves nothing behind."""

import time
from pathlib import Path

import pytest

from tests.slurm.host import NODES, SlurmHost

pytestmark = pytest.mark.slurm


def test_jobs_run_on_both_nodes_and_see_the_gpus_that_they_were_given(slurm: SlurmHost, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun -l bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'\n")
    options = ("-p", "gpu", "-N", 2, "--ntasks-per-node=1", "--gres=gpu:1", "-o", tmp_path / "out", "-t", 5)
    number = slurm("sbatch", "--parsable", *options, script).strip()
    deadline = time.monotonic() + 60
    while slurm("squeue", "-h", "-j", number) and time.monotonic() < deadline:
        time.sleep(0.2)
    lines = sorted((tmp_path / "out").read_text().split())
    assert lines == sorted(["0:", "1:", *NODES, "0", "0"])
