"""Runs from the command line, as a user calls it, over worker jobs.

Their `python` is that of `tests.preloaded`, in drivers, jobs and scripts alike. Runs that go their whole way in real
interpreters: see tests/slurm/test_digits.py.
"""

import atexit
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distinfluence import open_influences
from distinfluence.app.yaml_file import read_yaml, to_yaml
from tests.preloaded import Preloaded
from tests.processes import finished, started
from tests.reference import Reference
from tests.slurm.host import SlurmHost
from tests.test_job import content
from tests.zoo import build

ROOT = Path(__file__).parents[2]
SECONDS = 240.0  # within which anything must have happened, also where everything is slow
STRIPS = 23  # of a slow job, one for each training sample


def cluster_file(
    folder: Path, workers: int = 2, *, keys: Mapping[str, object] | None = None, **settings: object
) -> Path:
    """Worker jobs of one core in the partition cpu, unless the settings, or other keys of the file, say otherwise."""
    given = {"queue": "cpu", "cores": 1, "memory": "2GB", "walltime": "00:10:00", **settings}
    return written(folder / "slurm.yaml", {"kind": "slurm", "workers": workers, "settings": given, **(keys or {})})


def shipped(folder: Path, name: str, *, keys: Mapping[str, object], **settings: object) -> Path:
    """A cluster file of deploy/slurm, but for these keys and settings."""
    content: dict[str, Any] = dict(read_yaml(ROOT / "deploy" / "slurm" / name, "file").content)
    return written(folder / name, {**content, **keys, "settings": {**content["settings"], **settings}})


def slow_job(folder: Path, seconds: float = 0.5, *, log: str = "", **changes: Any) -> Path:
    """A job each of whose strips takes so many seconds, until `hurry`; log: see `tests.slurm.sources.slow_model`."""
    folder.mkdir(exist_ok=True)
    arguments = {"seconds": seconds, "folder": str(folder), "log": log}
    model = {"factory": {"target": "tests.slurm.sources:slow_model", "arguments": arguments}}
    chunks = {"train": 1, "test": 2, "panel": 6}
    return written(folder / "job.yaml", content(**{"model": model, "chunks": chunks, "solve": "rows", **changes}))


def hurry(job: Path) -> None:
    """What the slow job was slow for has happened: the rest of its strips takes no time."""
    (job.parent / "hurry").touch()


def assert_right(result: Path) -> None:
    """A slow job's result is whole, and what a dense reference gives."""
    found = open_influences(result)
    assert found.complete
    expected = Reference(build("mlp classification")).influences("hessian", 0.01).numpy()
    np.testing.assert_allclose(found[:], expected, rtol=1e-6, atol=1e-4)  # stored in float32


def written(path: Path, values: Mapping[str, object]) -> Path:
    path.write_text(to_yaml(dict(values)))
    return path


def command(*arguments: object) -> list[str]:
    return ["python", "-m", "distinfluence", *map(str, arguments)]


REAL = Path(sys.executable).parent  # The folder whose `python` is a fresh interpreter.


def environment(slurm: SlurmHost, path: Path | None = None) -> dict[str, str]:
    """Of a shell on a login node; dask-jobqueue's own files stay out of the home folder. path: goes first."""
    own = {"PYTHONPATH": str(ROOT), "DASK_CONFIG": str(slurm.root / "dask")}
    folders = [*([] if path is None else [path]), _preloaded(slurm.root).parent, REAL]
    return {**slurm.environment, **own, "PATH": ":".join([*map(str, folders), slurm.environment["PATH"]])}


@functools.cache
def _preloaded(root: Path) -> Path:
    server = Preloaded({**os.environ, "PYTHONPATH": str(ROOT), "DASK_CONFIG": str(root / "dask")})
    atexit.register(server.stop)
    return server.python


def run_to_its_end(slurm: SlurmHost, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """A command of ours, run to its end."""
    return finished(command(*arguments), limit=SECONDS, env=environment(slurm))


@contextmanager
def running(slurm: SlurmHost, *arguments: object, path: Path | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A command of ours, under way; ended if the test leaves it behind. path: a folder of programs that go first."""
    with started(
        command(*arguments),
        env=environment(slurm, path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # a shell has what it runs in the background ignore Ctrl-C, these tests included
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        yield process


def all_marks(process: "subprocess.Popen[str]", result: Path) -> set[tuple[str, int]]:
    """Every mark that was ever seen in the result until the process ended."""
    seen: set[tuple[str, int]] = set()
    while process.poll() is None:
        seen |= set(marks(result).items())
        time.sleep(0.2)
    return seen | set(marks(result).items())


def end_of(process: "subprocess.Popen[str]") -> str:
    """What it wrote, when it has ended well."""
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], Any], what: str, process: "subprocess.Popen[str] | None" = None) -> Any:
    """What the condition returns once that is true. The process must not have ended before."""
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended before {what}: {process.communicate()[0]}")
        assert time.monotonic() < end, f"not within {SECONDS:g} s: {what}"
        time.sleep(0.5)  # most conditions ask SLURM, which takes time from the runs
    return found


def marks(result: Path) -> dict[str, int]:
    """Strip → when its mark was set. One that is made again gets a new mark; those on their way have another name."""
    folder = result / "strip_status" / "c"
    there = [entry for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
    return {entry.name: entry.stat().st_mtime_ns for entry in there}


def made_once(before: dict[str, int], result: Path) -> bool:
    """Whether all is there, and what was marked before has not been made again."""
    after = marks(result)
    return open_influences(result).complete and before == {name: after[name] for name in before}


def submitted(slurm: SlurmHost, folder: Path, script: str, *arguments: object, options: tuple[object, ...] = ()) -> str:
    """The number of a job of one of the scripts in deploy/slurm, submitted from this folder."""
    return sbatch(slurm, folder, *options, ROOT / "deploy" / "slurm" / script, *arguments)


def sbatch(slurm: SlurmHost, folder: Path, *arguments: object) -> str:
    """The number of a job submitted from this folder, with one thread for torch."""
    env = {**environment(slurm), "OMP_NUM_THREADS": "1"}
    return finished(["sbatch", "--parsable", *arguments], env=env, cwd=folder, check=True).stdout.strip()


def log_of(folder: Path, number: str) -> str:
    """What a submitted script wrote, or each element of an array."""
    return "".join(log.read_text() for log in sorted(folder.glob(f"influences-{number}*.log")))


def strips_done(result: Path) -> int:
    """How many strips of a result are marked; 0 as long as there is none."""
    return len(marks(result))


def jobs_in(slurm: SlurmHost, state: str) -> list[str]:
    """Numbers of the jobs in this state."""
    return slurm("squeue", "-h", "-t", state, "-o", "%A").split()


def is_back(slurm: SlurmHost, number: str, times: int) -> bool:
    """Whether a job that was requeued waits again, or has been started again that many times."""
    return number in jobs_in(slurm, "PENDING") or f"Restarts={times} " in slurm("scontrol", "show", "job", number)


def states(slurm: SlurmHost) -> dict[str, str]:
    """Job number → state, of all that SLURM remembers."""
    lines = slurm("squeue", "-h", "--states=all", "-o", "%A %T").splitlines()
    return {line.split()[0]: line.split()[1] for line in lines}
