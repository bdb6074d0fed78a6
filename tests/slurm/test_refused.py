"""Jobs that cannot start: an error soon, which names the cause and shows the log's end; nothing left in the queue."""

from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import cluster_file, finished, slow_job

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"queue": "cpus"}, ["the queue refuses worker jobs", "invalid partition specified: cpus"]),
        ({"memory": "900GB"}, ["the queue refuses worker jobs", "Memory specification can not be satisfied"]),
        (
            {"python": "/no/such/python"},
            ["ended before their worker had started", "exit code 127", ".err:", "/no/such/python: No such file"],
        ),
        ({"job_extra_directives": ["--hold"]}, ["no worker job started within `timeout`", "JobHeldUser"]),
    ],
    ids=["partition", "memory", "python", "held"],
)
def test_jobs_that_cannot_start_end_the_run_with_their_reason(
    settings: dict[str, Any], says: list[str], slurm: SlurmHost, tmp_path: Path
) -> None:
    cluster = cluster_file(tmp_path, **settings)
    if "--hold" in str(settings):
        cluster.write_text(cluster.read_text() + "timeout: 5\n")
    done = finished(slurm, "run", slow_job(tmp_path), "--cluster", cluster)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in done.stderr
    assert queue(slurm) == []
