"""What can be said of deploy/slurm without a queue: that its files are valid, and how its scripts take signals."""

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distinfluence.app.sections import ClusterSection
from distinfluence.scaling.clusters.job_settings import cluster_class, job_arguments
from tests.processes import LIMIT, finished, started
from tests.slurm.runs import ROOT

FILES = ROOT / "deploy" / "slurm"
CLUSTERS = sorted(path.name for path in FILES.glob("*.yaml"))
SCRIPTS = sorted(path.name for path in FILES.glob("*.sbatch"))


def job_script(name: str, folder: Path) -> str:
    """What would be submitted for each worker of a cluster file."""
    section = ClusterSection.read(FILES / name)
    asked = cluster_class(section.kind)
    arguments = job_arguments(asked, {**section.settings, "security": False}, {}, folder)
    for setting in ("scheduler_options", "shared_temp_directory"):
        arguments.pop(setting)
    return str(asked.job_cls("tls://host:1", name="worker", **arguments).job_script())


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("cpu.yaml", ["-p cpu", "--cpus-per-task=4", "--mem=15G", "-t 04:00:00"]),
        ("gpu.yaml", ["-p gpu", "--gres=gpu:1", "--cpus-per-task=8", "--mem=60G", "-t 04:00:00"]),
        ("spot.yaml", ["-p spot", "--cpus-per-task=4", "--mem=15G", "-t 01:00:00"]),
    ],
)
def test_a_cluster_file_is_valid_and_asks_for_what_it_says(
    name: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("dask_jobqueue") is None:  # not imported here: it would take Ctrl-C for itself
        pytest.skip("needs dask-jobqueue")
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "dask"))  # dask-jobqueue writes a file there
    text = job_script(name, tmp_path)
    for line in lines:
        assert f"#SBATCH {line}\n" in text
    assert "--nthreads 1" in text
    assert "--lifetime " in text
    assert ("--resources GPU=1" in text) == (name == "gpu.yaml")


def test_every_cluster_file_is_among_those_that_are_tested() -> None:
    assert CLUSTERS == ["cpu.yaml", "gpu.yaml", "spot.yaml"]


def test_the_readme_has_a_section_for_every_file() -> None:
    readme = (FILES / "README.md").read_text()
    for path in FILES.iterdir():
        assert path.name == "README.md" or f"## `{path.name}`" in readme, path.name


def test_the_image_is_built_from_files_that_are_there() -> None:
    lines = (FILES / "Containerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_valid_and_says_what_is_missing(name: str) -> None:
    finished(["bash", "-n", FILES / name], check=True)
    done = finished(["bash", FILES / name])
    assert done.returncode != 0
    assert "the job file is missing: sbatch" in done.stderr


def stubs(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which these programs are found first; each is a line of shell."""
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("signum", "status", "requeued"),
    [(signal.SIGUSR1, 130, True), (signal.SIGTERM, 130, False), (signal.SIGUSR1, 0, False)],
    ids=["at its limit", "by scancel", "as it ends well"],
)
def test_a_driver_job_queues_again_at_its_limit_and_not_when_it_is_cancelled(
    signum: signal.Signals, status: int, requeued: bool, tmp_path: Path
) -> None:
    # stands for the run: it stops in its own time after SIGTERM
    python = f"trap 'sleep 0.2; exit {status}' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    environment = stubs(tmp_path, python=python, scontrol=f'echo "$@" >{tmp_path}/requeued')
    with started(["bash", FILES / "driver.sbatch", "job.yaml", "cpu.yaml"], env=environment) as driver:
        until((tmp_path / "up").exists)
        driver.send_signal(signum)
        assert driver.wait(timeout=LIMIT) == status
    asked = tmp_path / "requeued"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if requeued else "")


@pytest.mark.parametrize("when", ["certificate", "run"])
def test_one_allocation_leaves_no_key_when_it_is_cancelled(when: str, tmp_path: Path) -> None:
    up = f"touch {tmp_path}/up; exec sleep 3600"
    run = f"trap 'exit 130' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    openssl = f"touch {tmp_path}/up; sleep 0.3" if when == "certificate" else "exit 0"
    environment = stubs(tmp_path, openssl=openssl, python=run, srun=up.replace("/up", "/step"))
    environment |= {"SLURM_CPUS_PER_TASK": "1"}
    with started(["bash", FILES / "allocation.sbatch", "job.yaml"], env=environment, cwd=tmp_path) as script:
        until((tmp_path / "up").exists)
        assert (tmp_path / ".influences-7").is_dir()
        script.send_signal(signal.SIGTERM)
        # the steps would go on for an hour
        assert script.wait(timeout=LIMIT) == (143 if when == "certificate" else 130)
    assert not (tmp_path / ".influences-7").exists()
