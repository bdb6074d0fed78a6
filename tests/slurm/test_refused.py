"""Jobs that cannot start: an error soon, which names the cause and shows the log's end; nothing left in the queue."""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.slurm.conftest import queue
from tests.slurm.host import SlurmHost
from tests.slurm.runs import SECONDS, cluster_file, running, slow_job

pytestmark = pytest.mark.slurm

SOON = 75.0  # seconds from the first sbatch to the end of the command: a handful, where other things do not wait too


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
        {"job_extra_directives": ["--hold"]}, ("no worker job started within `timeout`", "JobHeldUser"), {"timeout": 5}
    ),
}


class End(NamedTuple):
    """How a run ended, and how many seconds after its first sbatch."""

    status: int
    output: str
    seconds: float


@pytest.fixture(scope="module")
def ends(running_slurm: SlurmHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, End]]:
    """All runs at once; each finds an sbatch in its way that notes when it was called."""
    sbatch = shutil.which("sbatch", path=running_slurm.environment["PATH"])
    with ExitStack() as stack:
        started = {}
        for name, case in CASES.items():
            folder = tmp_path_factory.mktemp(name)
            shim = folder / "bin" / "sbatch"
            shim.parent.mkdir()
            shim.write_text(f'#!/bin/sh\ndate +%s.%N >>{folder}/submissions\nexec {sbatch} "$@"\n')
            shim.chmod(0o755)
            cluster = cluster_file(folder, keys=case.keys, **case.settings)
            process = running(running_slurm, "run", slow_job(folder), "--cluster", cluster, path=shim.parent)
            started[name] = folder, stack.enter_context(process)
        yield {name: _end(*each) for name, each in _as_they_end(started)}


def _as_they_end(
    started: dict[str, tuple[Path, "subprocess.Popen[str]"]],
) -> Iterator[tuple[str, tuple[Path, "subprocess.Popen[str]", float]]]:
    limit = time.monotonic() + SECONDS
    waiting = dict(started)
    while waiting:
        assert time.monotonic() < limit, f"still running: {list(waiting)}"
        for name, (folder, process) in list(waiting.items()):
            if process.poll() is not None:
                del waiting[name]
                yield name, (folder, process, time.time())
        time.sleep(0.1)


def _end(folder: Path, process: "subprocess.Popen[str]", ended: float) -> End:
    first = float((folder / "submissions").read_text().split()[0])
    return End(process.returncode, process.communicate()[0], ended - first)


@pytest.mark.parametrize("name", CASES)
def test_jobs_that_cannot_start_end_the_run_with_their_reason(
    name: str, ends: dict[str, End], slurm: SlurmHost
) -> None:
    end = ends[name]
    assert end.status == 1, end.output
    assert "Traceback" not in end.output
    for text in CASES[name].says:
        assert text in end.output
    assert end.seconds < SOON
    assert queue(slurm) == []
