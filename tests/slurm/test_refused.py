"""Jobs that cannot start: an error which names the cause and shows the log's end; nothing is left in the queue."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import SECONDS, cluster_file, running, slow_job

pytestmark = pytest.mark.slurm


class Case(NamedTuple):
    """What the cluster file says, and words of the error."""

    settings: Mapping[str, Any]
    says: tuple[str, ...]
    keys: Mapping[str, Any] = {}


CASES = {
    "partition": Case({"queue": "cpus"}, ("the queue refuses worker jobs", "invalid partition specified: cpus")),
    "memory": Case({"memory": "900GB"}, ("the queue refuses worker jobs", "Memory specification can not be satisfied")),
    "python": Case(
        {"python": "/no/such/python"},
        ("ended before their worker had started", "exit code 127", ".err:", "/no/such/python: No such file"),
    ),
    "prologue": Case(
        {"job_script_prologue": ["cd /no/such/scratch || exit 3"]},
        ("ended before their worker had started", "exit code 3", ".err:", "/no/such/scratch: No such file"),
    ),
    "held": Case(
        {"job_extra_directives": ["--hold"]}, ("no worker job started within `timeout`", "JobHeldUser"), {"timeout": 20}
    ),
}


def test_jobs_that_cannot_start_end_the_run_with_their_reason(slurm: SlurmHost, tmp_path: Path) -> None:
    """All runs at once, and long before `timeout`, where a run waits for its first worker, would end them."""
    with ExitStack() as stack:
        processes = {}
        for name, case in CASES.items():
            job = slow_job(tmp_path / name)
            cluster = cluster_file(tmp_path / name, keys=case.keys, **case.settings)
            process = running(slurm, "run", job, "--cluster", cluster)
            processes[name] = stack.enter_context(process)
        outputs = {name: process.communicate(timeout=SECONDS)[0] for name, process in processes.items()}
    assert {name: process.returncode for name, process in processes.items()} == dict.fromkeys(CASES, 1), outputs
    said = {name: [text for text in case.says if text not in outputs[name]] for name, case in CASES.items()}
    assert said == {name: [] for name in CASES}, outputs
    assert [name for name, output in outputs.items() if "Traceback" in output] == []
    assert queue(slurm) == []
