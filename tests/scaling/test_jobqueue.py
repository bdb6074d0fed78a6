"""What dask-jobqueue is asked for by a cluster file, and jobs that are processes of this host; all without a queue."""

import asyncio
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client

from distinfluence.app.sections import ClusterSection
from distinfluence.app.yaml_file import to_yaml
from distinfluence.errors import ClusterError, SettingError
from distinfluence.scaling import ClusterSpec, connected
from distinfluence.scaling.clusters import jobqueue, watchdog
from distinfluence.scaling.clusters import orphan_guard as guard
from distinfluence.scaling.clusters.job_settings import cluster_class, job_arguments, seconds_of_workers
from distinfluence.scaling.clusters.slurm import walltime_seconds, was_requeued
from tests.processes import finished

if importlib.util.find_spec("dask_jobqueue") is None:  # not imported here: it would take Ctrl-C for itself
    pytest.skip("needs dask-jobqueue", allow_module_level=True)

BASE = {"cores": 4, "memory": "8GB", "security": False}


@pytest.fixture(autouse=True)
def _own_dask_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "dask"))  # dask-jobqueue writes a file there


def script(kind: str, folder: Path, **settings: Any) -> str:
    """The job's script, as dask-jobqueue writes it."""
    cluster = cluster_class(kind)
    arguments = job_arguments(cluster, {**BASE, **settings}, {"COLOUR": "blue"}, folder)
    for name in ("scheduler_options", "shared_temp_directory"):
        arguments.pop(name)
    return str(cluster.job_cls("tls://host:1", name="worker", **arguments).job_script())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("10:30", 630),
        ("01:00:00", 3600),
        ("1-0", 86400),
        ("2-12:30", 217800),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, seconds: float | None) -> None:
    assert walltime_seconds(text) == seconds


def test_a_worker_has_one_thread_and_leaves_before_its_limit(tmp_path: Path) -> None:
    text = script(
        "slurm", tmp_path, walltime="10:00:00", queue="gpu", **{"worker-extra-args": ["--resources", "GPU=1"]}
    )
    assert "#SBATCH --cpus-per-task=4" in text
    assert "#SBATCH -p gpu" in text
    assert "#SBATCH --mem=8G" in text
    worker = text.strip().splitlines()[-1]
    assert worker.rindex("--nthreads 1") > worker.index("--nthreads 4")  # the last one holds
    assert "--resources GPU=1" in worker
    assert "--lifetime 30600s --lifetime-stagger 3600s" in worker  # 8.5 h, give or take one, of 10
    assert "export COLOUR=${COLOUR:-blue}" in text
    assert "--nworkers" not in worker


def test_what_the_file_says_goes_before_what_is_chosen_here(tmp_path: Path) -> None:
    own = script("slurm", tmp_path, worker_extra_args=["--lifetime", "5m"], processes=2, job_name="mine")
    assert own.count("--lifetime") == 1
    assert "--nworkers 2" in own
    assert re.search(r"#SBATCH -J mine-[0-9a-f]{8}$", own, re.MULTILINE)
    assert "--lifetime" not in script("slurm", tmp_path, walltime="UNLIMITED")
    assert "--lifetime" not in script("pbs", tmp_path, walltime="10:00:00")


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        ("walltime: 4:00:00", ["-t 4:00:00"]),
        ("walltime: 1:30", ["-t 1:30"]),
        ("walltime: 2-12", ["-t 2-12"]),
        ("walltime: 90", ["-t 90"]),  # minutes, as SLURM reads it
        ("queue: on", ["-p on"]),
        ("queue: 2026-01-31", ["-p 2026-01-31"]),
        ("account: 0120", ["-A 0120"]),
        ("account: 120", ["-A 120"]),
        ("account: 1_000", ["-A 1_000"]),
        ("memory: 16GiB", ["--mem=16G"]),
        ("memory: 17179869184", ["--mem=16G"]),
        ("job-extra-directives: [--time-min=1:30, --nice=7]", ["--time-min=1:30", "--nice=7"]),
    ],
)
def test_what_a_cluster_file_says_reaches_the_script_as_it_was_meant(
    written: str, lines: list[str], tmp_path: Path
) -> None:
    base = {name: value for name, value in BASE.items() if name != written.partition(":")[0]}
    file = tmp_path / "cluster.yaml"
    file.write_text(to_yaml({"kind": "slurm", "workers": 1, "settings": base}) + f"  {written}\n")
    settings = ClusterSection.read(file).spec().settings
    found = [line.removeprefix("#SBATCH ") for line in script("slurm", tmp_path, **settings).splitlines()]
    assert set(lines) <= set(found)


@pytest.mark.parametrize(("walltime", "lifetime"), [(90, "4320s"), ("90", "4320s"), ("1:30:00", "4320s"), (0, "")])
def test_a_lifetime_is_that_of_the_walltime_as_slurm_reads_it(
    walltime: int | str, lifetime: str, tmp_path: Path
) -> None:
    cluster = cluster_class("slurm")
    arguments = job_arguments(cluster, {**BASE, "walltime": walltime}, {}, tmp_path)
    assert seconds_of_workers(cluster, arguments) == (4320 if walltime else None)
    assert (f"--lifetime {lifetime} " in script("slurm", tmp_path, walltime=walltime)) == bool(lifetime)


@pytest.mark.parametrize(
    "walltime", ["4h", "1:2:3:4", "1_0", "+4", "-4", "2-", "1:2:3-4", "٤", "", ":30", "4:00:00.5", "90 m", -1]
)
def test_a_walltime_that_slurm_does_not_read_is_refused(walltime: int | str) -> None:
    with pytest.raises(SettingError, match="must be a time as sbatch reads it"):
        ClusterSpec("slurm", workers=1, settings={**BASE, "walltime": walltime})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"partition": "cpu"},
            "`settings.partition` is not a setting of dask-jobqueue's SLURMCluster. Did you mean `q",
        ),
        ({"wall-time": "1"}, "Did you mean `walltime`?"),
        ({"n_workers": 3}, "`settings.n_workers` of the cluster is set by distinfluence"),
        ({"walltime": "two hours"}, "`settings.walltime` of the cluster must be a time as sbatch reads it"),
        ({"job-extra-directives": ["--job-name=x"]}, "`settings.job-extra-directives` must not name the jobs"),
        ({"processes": "two"}, "`settings.processes` of the cluster must be a whole number"),
        ({"memory": None}, "You must specify how much cores and memory"),
    ],
)
def test_a_setting_that_is_none_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with (
        pytest.raises(SettingError, match="`") as caught,
        connected(ClusterSpec("slurm", workers=1, settings={**BASE, **settings}), folder=tmp_path),
    ):
        pass
    assert message in str(caught.value)


def test_where_there_is_no_queue_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = ClusterSpec("slurm", workers=1, settings={**BASE, "scheduler_options": {"host": "127.0.0.1"}})
    with pytest.raises(ClusterError, match="sbatch: No such file or directory"), connected(spec, folder=tmp_path):
        pass


def test_interrupts_stay_what_they_are_when_dask_jobqueue_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dask_jobqueue")]:
        monkeypatch.delitem(sys.modules, name)
    before = signal.getsignal(signal.SIGINT)
    assert cluster_class("slurm").__name__ == "SLURMCluster"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_job_that_was_started_before_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not was_requeued()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert was_requeued()


def test_the_mark_in_a_jobs_name_is_found_again_by_the_next_start_of_its_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def name(folder: Path) -> str:
        cluster = cluster_class("slurm")
        return str(job_arguments(cluster, {**BASE, "job-name": "a b,c"}, {}, folder)["job_name"])

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert re.fullmatch("a-b-c-[0-9a-f]{8}", name(tmp_path))
    assert name(tmp_path) != name(tmp_path)  # two runs of one user, side by side
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert name(tmp_path) == name(tmp_path)
    assert name(tmp_path) != name(tmp_path / "other")  # two runs in one allocation


# the pipes of dask-jobqueue's LocalJob
unclosed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def here(workers: int, folder: Path, minimum: int | None = None, **settings: object) -> ClusterSpec:
    """Jobs that are processes of this host, by a class of dask-jobqueue's that has no name among the kinds."""
    given = {"cores": 1, "memory": "1GB", "scheduler-options": {"host": "127.0.0.1"}, "security": False, **settings}
    return ClusterSpec("dask_jobqueue.local:LocalCluster", workers=workers, minimum=minimum, settings=given)


def names(client: Client) -> list[str]:
    """Of the workers that are there."""
    workers = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    return sorted(worker["name"] for worker in workers.values())


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch and adaptive scaling that wait for less."""
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.3)
    monkeypatch.setattr(watchdog, "GONE_SECONDS", 0.5)
    monkeypatch.setattr(jobqueue, "ADAPT_SECONDS", 0.5)
    monkeypatch.setattr(jobqueue, "ADAPT_LOOKS", 2)


@unclosed
@pytest.mark.usefixtures("hurried")
def test_a_class_of_clusters_is_enough_and_its_jobs_are_replaced(tmp_path: Path) -> None:
    with connected(here(1, tmp_path), folder=tmp_path) as client:
        assert names(client) == ["LocalCluster-0"]
        os.kill(client.submit(os.getppid, pure=False).result(), signal.SIGKILL)
        wait_for(lambda: names(client) == ["LocalCluster-1"])
        worker = client.submit(os.getpid, pure=False).result()
    wait_for(lambda: not Path(f"/proc/{worker}").exists())


@unclosed
@pytest.mark.usefixtures("hurried")
def test_adaptive_scaling_follows_the_work_and_makes_up_for_jobs_that_end(tmp_path: Path) -> None:
    with connected(here(2, tmp_path, minimum=1), folder=tmp_path) as client:
        assert names(client) == ["LocalCluster-0"]
        slow = client.map(time.sleep, [1.0] * 12, pure=False)
        wait_for(lambda: len(names(client)) == 2)
        client.cancel(slow)
        wait_for(lambda: len(names(client)) == 1)
        (last,) = names(client)
        os.kill(client.submit(os.getppid, pure=False).result(), signal.SIGKILL)
        wait_for(lambda: names(client) not in ([], [last]))
        assert not set(names(client)) & {"LocalCluster-0", "LocalCluster-1"}  # no name is given out twice


@unclosed
def test_a_job_whose_command_is_not_there_is_a_refusal(tmp_path: Path) -> None:
    spec = here(1, tmp_path, python="/no/such/python")
    with pytest.raises(ClusterError, match="the job's command: No such file"), connected(spec, folder=tmp_path):
        pass


@pytest.mark.parametrize("name", [None, "influences-1a2b"])
@pytest.mark.parametrize("dies", [True, False])
def test_a_guard_cancels_the_jobs_of_a_driver_that_is_killed(dies: bool, name: str | None, tmp_path: Path) -> None:
    done, log = tmp_path / "cancelled", tmp_path / "guard.log"
    for program, writes in (("cancel", f'echo "$@" >>{done}'), ("squeue", "exit 0")):
        (tmp_path / program).write_text(f"#!/bin/sh\n{writes}\n")
        (tmp_path / program).chmod(0o755)
    driver = f"""
import os, pathlib, runpy, signal
Guard = runpy.run_path({guard.__file__!r})["Guard"]
guard = Guard(["cancel"], {name!r}, pathlib.Path({str(log)!r}), dict(os.environ))
guard.note("17")
guard.note("18")
os.kill(os.getpid(), signal.SIGKILL) if {dies} else guard.release()
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    finished([sys.executable, "-c", driver], env=environment)  # the guard leads a session of its own and lives on
    if dies:
        wait_for(log.exists)
        assert "died; its jobs" in log.read_text()
        asked = done.read_text().splitlines()
        assert asked[0] == ("17 18" if name is None else f"--user={os.getuid()} --name={name}")
    assert done.exists() is log.exists() is dies


def test_adaptive_scaling_counts_jobs_and_holds_still_while_the_watch_waits() -> None:
    asked: dict[str, Any] = {}
    cluster = SimpleNamespace(adapt=lambda **options: asked.update(options), scale=asked.update, plan={"a", "b"})
    watch = watchdog.Watchdog(cluster, None, None, [], print)
    jobqueue._adapt(cluster, watch, 1, 3)
    assert {name: asked[name] for name in ("minimum_jobs", "maximum_jobs", "jobs")} == {
        "minimum_jobs": 1,
        "maximum_jobs": 3,
        "jobs": 1,
    }
    adaptive = asked["Adaptive"](cluster, minimum=1, maximum=3, interval=0)

    async def target() -> int:
        return 9

    adaptive.target = target
    assert asyncio.run(adaptive.safe_target()) == 3
    watch._not_before = time.monotonic() + 60
    assert asyncio.run(adaptive.safe_target()) == 2  # those that are there
