"""What dask-jobqueue is asked for by a cluster file, without a queue: arguments, time limits, the watch's judgement."""

import re
from pathlib import Path
from typing import Any

import pytest

from distinfluence.errors import ClusterError, SettingError
from distinfluence.scaling import ClusterSpec, connected
from distinfluence.scaling.job_settings import cluster_class, job_arguments
from distinfluence.scaling.slurm import walltime_seconds, was_requeued

pytest.importorskip("dask_jobqueue")

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
    ("settings", "message"),
    [
        ({"partition": "cpu"}, "`settings.partition` is no setting of dask-jobqueue's SLURMCluster. Known: account, "),
        ({"wall-time": "1"}, "Did you mean `walltime`?"),
        ({"n_workers": 3}, "`settings.n_workers` of the cluster is set by distinfluence"),
        ({"walltime": "two hours"}, "`walltime` of the cluster must be a time as sbatch reads it"),
        ({"job-extra-directives": ["--job-name=x"]}, "`settings.job-extra-directives` must not name the jobs"),
        ({"processes": "two"}, "`processes` of the cluster must be a whole number"),
        ({"memory": None}, "You must specify how much cores and memory"),
    ],
)
def test_a_setting_that_is_none_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    spec = ClusterSpec("slurm", workers=1, settings={**BASE, **settings})
    with pytest.raises(SettingError, match="`") as caught, connected(spec, folder=tmp_path):
        pass
    assert message in str(caught.value)


def test_where_there_is_no_queue_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = ClusterSpec("slurm", workers=1, settings={**BASE, "scheduler_options": {"host": "127.0.0.1"}})
    with pytest.raises(ClusterError, match="sbatch: No such file or directory"), connected(spec, folder=tmp_path):
        pass


def test_a_job_that_was_started_before_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not was_requeued()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert was_requeued()
