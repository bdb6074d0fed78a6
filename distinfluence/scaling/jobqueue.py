"""Workers as batch jobs, through dask-jobqueue: one job for each worker, watched, and gone when the run is over."""

import asyncio
import difflib
import inspect
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
from dask.utils import parse_bytes
from distributed import Client, Status
from distributed.security import Security

from distinfluence.errors import ClusterError, MissingDependencyError, SettingError
from distinfluence.scaling.recipe import Recipe
from distinfluence.scaling.slurm import SlurmQueue, submission_environment, walltime_seconds, was_requeued
from distinfluence.scaling.watchdog import Watchdog

QUEUES: Mapping[str, str] = {
    "htcondor": "HTCondorCluster",
    "lsf": "LSFCluster",
    "moab": "MoabCluster",
    "oar": "OARCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "slurm": "SLURMCluster",
}
OURS = ("n_workers", "job_cls", "asynchronous", "loop")  # of dask-jobqueue's arguments, set here
POLL_SECONDS = 0.2
CLOSE_SECONDS = 60.0


def job_kind(kind: str) -> bool:
    """Whether a cluster of this kind is one of jobs: a key of `QUEUES`, or a dask-jobqueue class as module:Class."""
    return kind in QUEUES or ":" in kind


@contextmanager
def job_cluster(
    kind: str,
    workers: int,
    settings: Mapping[str, object],
    *,
    minimum: int | None,
    timeout: float | None,
    environment: Mapping[str, str],
    folder: Path,
    announce: Callable[[str], None],
) -> Iterator[Client]:
    """A client of a scheduler in this process whose workers are jobs; every one of them has gone afterwards.

    kind, workers, settings, minimum, timeout: see `ClusterSpec`. environment: of the workers. folder: for logs and
    certificates, seen by every node. Entered when the first worker has come. Raises ClusterError with what the queue or
    the jobs' logs say when jobs are refused or end before they work, SettingError for settings that dask-jobqueue does
    not know.
    """
    cluster_class, queue = _cluster_class(kind), SlurmQueue() if _is_slurm(kind) else None
    refusals: list[str] = []
    arguments = _arguments(cluster_class, settings, environment, folder)
    # Dask would cancel a job this long after its worker left; the watch decides that
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "30 days"}):
        cluster = _scheduler(cluster_class, arguments, refusals)
        watchdog = Watchdog(cluster, queue, workers if minimum is None else None, refusals, announce)
        try:
            if queue is not None and was_requeued():
                _cancel_left(queue, announce)
            if minimum is not None:
                cluster.adapt(minimum=minimum, maximum=workers, interval="5 s", wait_count=12)
            watchdog.start()
            yield from _watched_client(cluster, watchdog, timeout)
        finally:
            watchdog.stop()
            _close(cluster, watchdog, queue)


def _watched_client(cluster: Any, watchdog: Watchdog, timeout: float | None) -> Iterator[Client]:
    """A client once there is a worker; what the run raises because the watch gave it up becomes what the watch says."""
    with Client(cluster) as client:
        # whatever the run waits for, it stops waiting when its client has closed
        watchdog.on_failure = lambda: client.close(timeout=5)
        try:
            _wait_for_worker(watchdog, timeout)
            yield client
        except (Exception, asyncio.CancelledError) as error:
            if watchdog.failure is None:
                raise
            raise ClusterError(watchdog.failure) from error


def _wait_for_worker(watchdog: Watchdog, timeout: float | None) -> None:
    end = None if timeout is None else time.monotonic() + timeout
    while not watchdog.has_workers():
        if watchdog.failure is not None:
            raise ClusterError(watchdog.failure)
        if end is not None and time.monotonic() > end:
            raise ClusterError(
                f"no worker job started within `timeout`, {timeout:g} s; {watchdog.last_said or 'nothing is known'}. "
                "Pass a longer one, or none to wait as long as the queue takes."
            )
        time.sleep(POLL_SECONDS)


def _close(cluster: Any, watchdog: Watchdog, queue: SlurmQueue | None) -> None:
    """Close the cluster, which cancels its jobs, and cancel what that may have left: jobs that still wait."""
    with suppress(Exception):  # a scheduler that has gone is no reason to leave jobs behind
        cluster.close(timeout=CLOSE_SECONDS)
    if queue is not None:
        queue.cancel(sorted(watchdog.submitted))


def _scheduler(cluster_class: Any, arguments: dict[str, Any], refusals: list[str]) -> Any:
    """The cluster, with jobs that note refusals, and none of them submitted yet."""
    cluster = cluster_class.__new__(cluster_class)
    try:
        cluster.__init__(job_cls=_noting(cluster_class.job_cls, refusals), **arguments)
        return cluster
    except (ValueError, TypeError) as error:
        cluster.status = Status.closed  # it never opened: nothing is left for its finalizer to warn of
        raise SettingError(f"`settings` of the cluster: {error}") from error
    except (OSError, RuntimeError) as error:
        raise ClusterError(f"the scheduler cannot start here: {error}. Correct `settings` of the cluster.") from error


def _noting(job_class: Any, refusals: list[str]) -> Any:
    """The class of jobs, made to note why one could not be submitted, and to keep our own job's variables from it."""

    class NotingJob(job_class):  # type: ignore[misc]  # dask-jobqueue has no types
        async def start(self) -> None:
            try:
                await super().start()
            except RuntimeError as error:
                refusals.append(str(error).rpartition("stderr:\n")[2].strip() or str(error))
            except OSError as error:
                command = shlex.split(str(self.submit_command))[0]
                refusals.append(f"{command}: {error.strerror}. Run this where jobs can be submitted.")
            self.status = Status.running  # a job without a number: for the watch to deal with

        @staticmethod
        async def _call(cmd: list[str], **options: Any) -> Any:
            return await job_class._call(cmd, **{"env": submission_environment(), **options})

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed  # what the cluster asserts of it at the end

    NotingJob.__name__ = job_class.__name__
    return NotingJob


def _cluster_class(kind: str) -> Any:
    if ":" in kind:
        return Recipe(kind).resolve()
    try:
        import dask_jobqueue
    except ImportError as error:
        raise MissingDependencyError(
            f"a cluster of kind {kind!r} needs dask-jobqueue. Run: pip install 'dask-jobqueue>=0.9' cryptography"
        ) from error
    return getattr(dask_jobqueue, QUEUES[kind])


def job_memory(settings: Mapping[str, object]) -> int | None:
    """Bytes that each worker will be given, None where the settings leave that to dask-jobqueue's own files."""
    given = {name.replace("-", "_"): value for name, value in settings.items()}
    if given.get("memory") is None:
        return None
    try:
        return int(parse_bytes(str(given["memory"])) // int(str(given.get("processes") or 1)))
    except ValueError as error:
        raise SettingError(f"`memory` of the cluster must be bytes such as '16GB', got {given['memory']!r}.") from error


def _is_slurm(kind: str) -> bool:
    return kind == "slurm" or kind.endswith("SLURMCluster")


def _arguments(
    cluster_class: Any, settings: Mapping[str, object], environment: Mapping[str, str], folder: Path
) -> dict[str, Any]:
    """dask-jobqueue's arguments: the settings as given, and what makes its jobs fit for torch and for time limits."""
    given: dict[str, Any] = {name.replace("-", "_"): value for name, value in settings.items()}
    section = f"jobqueue.{cluster_class.job_cls.config_name}"
    _check_names(given, cluster_class, section)

    def chosen(name: str, default: Any) -> Any:
        configured = dask.config.get(f"{section}.{name.replace('_', '-')}", None)
        return given.get(name) if given.get(name) is not None else configured or default

    given["processes"] = int(chosen("processes", 1))
    # one thread in each process, whatever number of cores the job asks for: they are for torch's own threads
    extra = ["--nthreads", "1", *map(str, chosen("worker_extra_args", []))]
    if section.endswith(".slurm") and "--lifetime" not in extra:
        extra += _lifetime(str(chosen("walltime", "0")))
    given["worker_extra_args"] = extra
    exports = [f"export {name}=${{{name}:-{value}}}" for name, value in environment.items()]
    given["job_script_prologue"] = [*exports, *chosen("job_script_prologue", [])]
    given["job_name"] = given.get("job_name") or given.pop("name", None) or "distinfluence"
    given["log_directory"] = str(Path(str(chosen("log_directory", folder))).expanduser().absolute())
    given["shared_temp_directory"] = str(Path(str(chosen("shared_temp_directory", folder))).expanduser().absolute())
    for name in ("log_directory", "shared_temp_directory"):
        Path(given[name]).mkdir(parents=True, exist_ok=True)
    given["scheduler_options"] = {"dashboard_address": "127.0.0.1:0", **chosen("scheduler_options", {})}
    given["security"] = _security(given.get("security", True))
    if section.endswith(".slurm"):
        given["job_extra_directives"] = [f"--comment={_mark()}", *chosen("job_extra_directives", [])]
    return given


def _lifetime(walltime: str) -> list[str]:
    """Workers leave before their job is killed, not all at once, so that they can hand over what others need."""
    try:
        limit = walltime_seconds(walltime)
    except ValueError:
        raise SettingError(
            f"`walltime` of the cluster must be a time as sbatch reads it, such as '01:30:00', got {walltime!r}."
        ) from None
    if limit is None:
        return []
    reserve = min(max(60.0, limit / 10), 1800.0, limit / 3)
    stagger = limit / 10
    return ["--lifetime", f"{limit - reserve - stagger:.0f}s", "--lifetime-stagger", f"{stagger:.0f}s"]


def _security(wanted: object) -> Any:
    """A scheduler without it takes code from whoever reaches its port: on a cluster, from every other user."""
    if wanted is not True:
        return wanted or None
    try:
        return Security.temporary()
    except ImportError as error:
        raise MissingDependencyError(
            "certificates between scheduler and workers need `cryptography`. Run: pip install cryptography, "
            "or set `security: false` where only you can reach this host's ports."
        ) from error


def _check_names(given: Mapping[str, object], cluster_class: Any, section: str) -> None:
    known = {name.replace("-", "_") for name in dask.config.get(section, {})}
    for base in (*inspect.getmro(cluster_class), *inspect.getmro(cluster_class.job_cls)):
        if base is not object and "__init__" in vars(base):
            known |= set(inspect.signature(vars(base)["__init__"]).parameters)
    known -= {"self", "scheduler", "job_kwargs", "base_class_kwargs", "kwargs", *OURS}
    for name in given:
        if name in OURS:
            raise SettingError(f"`settings.{name}` of the cluster is set by distinfluence. Leave it out.")
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            raise SettingError(
                f"`settings.{name}` is no setting of dask-jobqueue's {cluster_class.__name__}."
                + (f" Did you mean `{close[0]}`?" if close else f" Known: {', '.join(sorted(known))}.")
            )


def _mark() -> str:
    """In the comment of a job: the driver's own job, by which its next start finds what this one left."""
    return f"distinfluence-{os.environ.get('SLURM_JOB_ID', 'interactive')}"


def _cancel_left(queue: SlurmQueue, announce: Callable[[str], None]) -> None:
    left = [number for number, job in (queue.look() or {}).items() if job.comment == _mark()]
    if left:
        announce(f"cancelling {len(left)} worker jobs that this job's last start left")
        queue.cancel(left)
