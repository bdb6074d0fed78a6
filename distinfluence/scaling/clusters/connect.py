"""Clusters by description: on this host, as jobs of a queue, or one that is running already."""

import difflib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import dask
import torch
from distributed import Client, LocalCluster, Worker, WorkerPlugin
from distributed.comm.core import CommClosedError
from distributed.worker_memory import parse_memory_limit
from tornado.ioloop import PeriodicCallback

from distinfluence.errors import ClusterError, MissingDependencyError, SettingError
from distinfluence.memory import free_bytes
from distinfluence.scaling.clusters.job_settings import (
    QUEUES,
    bytes_of,
    check_settings,
    job_kind,
    job_memory,
    job_processes,
)
from distinfluence.scaling.clusters.jobqueue import job_cluster

# Dask has its workers give memory back to the system at once, so that every large tensor costs page faults anew: ten
# times as many in a pass over the training set (tests/benchmarks/passes.py). These are glibc's thresholds as it would
# grow them by itself.
WORKER_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}

PATIENCE: Mapping[str, object] = {
    # a long torch call may hold up a worker's heartbeat: that is no reason to give up on it
    "distributed.scheduler.worker-ttl": "15 minutes",
    # workers that may die on a task, or next to it, before it is suspected
    "distributed.scheduler.allowed-failures": 10,
}

# of torch.func's first use
TORCHS_OWN = r"`torch\.jit\.script` is deprecated"

LOOPBACK = "127.0.0.1"
RUNNING = ("address", "scheduler_file")
KINDS = ("local", "cuda", *QUEUES, *RUNNING)
ON_DEATH = ("cancel", "leave")
LOCAL_WORKERS = 2
KEEP_SECONDS = 5.0  # between two looks whether all workers of this host are there
ANSWER_SECONDS = 60.0  # within which a running scheduler has to answer, where nobody says otherwise


@dataclass(frozen=True)
class ClusterSpec:
    """Where the workers are.

    Args:
        kind: "local" starts processes of one thread on this host, which listen on the loopback interface only; "cuda"
            one for each GPU that this process sees. A queue ("slurm", "pbs", … or a dask-jobqueue class as
            "module:Class") submits jobs and replaces those that end. "address" and "scheduler_file" join a running
            scheduler and leave it running.
        workers: Number of processes or jobs, the first so many GPUs for "cuda". Default: 2 for "local", all GPUs for
            "cuda"; jobs need it.
        memory_limit: Memory of each local worker as Dask reads it; "auto" is its share of the host.
        address: Address of a running scheduler (`tcp://…`), or the path of its file.
        timeout: Seconds to wait for the scheduler and the first worker. Default: 60; for jobs, as long as the queue
            takes.
        minimum: Least number of jobs. Dask then keeps between `minimum` and `workers` of them, as there is work.
        on_death: What becomes of jobs when this process is killed. "cancel": a guard process cancels them. "leave":
            they are left alone; workers end when they miss their scheduler, waiting jobs a minute after their start.
        settings: Settings of dask-jobqueue for jobs, of dask-cuda's `LocalCUDACluster` for GPUs.

    Raises:
        SettingError: If a setting is unknown, or missing for this kind.
    """

    kind: str = "local"
    workers: int | None = None
    memory_limit: str = "auto"
    address: str = ""
    timeout: float | None = None
    minimum: int | None = None
    on_death: str = "cancel"
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        jobs = job_kind(self.kind)
        if self.kind not in KINDS and not jobs:
            close = difflib.get_close_matches(str(self.kind), KINDS, n=1)
            raise SettingError(
                f"`kind` of the cluster must be one of {list(KINDS)}, or a class as module:Class, got {self.kind!r}."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )
        if self.workers is not None and self.workers < 1:
            raise SettingError(f"`workers` must be at least 1, got {self.workers}.")
        if self.kind in RUNNING and not self.address:
            raise SettingError(f"`address` must say where the scheduler is for a cluster of kind {self.kind!r}.")
        if jobs and self.workers is None:
            raise SettingError(f"`workers` must say how many jobs to submit for a cluster of kind {self.kind!r}.")
        if self.minimum is not None and not (jobs and 0 < self.minimum <= (self.workers or 0)):
            raise SettingError(
                f"`minimum` must be between 1 and `workers` of a cluster of jobs, got {self.minimum} with "
                f"{self.workers} workers of kind {self.kind!r}."
            )
        if self.on_death not in ON_DEATH or (self.on_death == "leave" and not jobs):
            raise SettingError(
                f"`on_death` must be one of {list(ON_DEATH)}, and is for clusters of jobs, got {self.on_death!r} with "
                f"kind {self.kind!r}."
            )
        if self.settings and not (jobs or self.kind == "cuda"):
            raise SettingError(f"`settings` are for clusters of jobs and GPUs, got some for kind {self.kind!r}.")
        if self.kind in QUEUES:
            check_settings(self.kind, self.settings)
        if self.memory_limit != "auto" and not _is_share(self.memory_limit):
            bytes_of("memory_limit", str(self.memory_limit))

    @property
    def n_workers(self) -> int:
        """Worker processes, where they are started by us and their number is known before."""
        return (self.workers or LOCAL_WORKERS) * (job_processes(self.settings) if job_kind(self.kind) else 1)


def _is_share(limit: str) -> bool:
    """Say whether Dask reads a memory limit as a share of the host's memory; 0 is no limit."""
    try:
        return 0 <= float(limit) <= 1
    except (ValueError, TypeError):
        return False


def planned_memory(spec: ClusterSpec) -> int | None:
    """Return the bytes that each worker of a cluster will get; None if only the workers themselves can say."""
    if job_kind(spec.kind):
        return job_memory(spec.settings)
    if spec.kind != "local":
        return None
    limit = parse_memory_limit(spec.memory_limit, 1, os.cpu_count() or 1, logger=logging.getLogger(__name__))
    return int(limit or free_bytes(torch.device("cpu")))


def planned_workers(spec: ClusterSpec) -> int | None:
    """Return how many worker processes a cluster will have, however few have come; None if that is not ours to say."""
    return spec.n_workers if spec.kind == "local" or job_kind(spec.kind) else None


class LeaveInterruptsToDriver(WorkerPlugin):
    """Ctrl-C reaches every process of the terminal: only the driver acts on it, and stops the workers in good order."""

    name = "distinfluence-leave-interrupts-to-driver"

    def setup(self, worker: Worker) -> None:
        """Ignore SIGINT, where this thread may say so."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class LeaveErrorsToDriver(WorkerPlugin):
    """What a task raises is raised again at the driver, which says it once, without a trace for each try."""

    name = "distinfluence-leave-errors-to-driver"

    def setup(self, worker: Worker) -> None:
        """Have this process's log leave them out, with a deprecation that is torch's own."""
        logging.getLogger("distributed.worker").addFilter(_raised_nowhere_else)
        warnings.filterwarnings("ignore", message=TORCHS_OWN)


def _raised_nowhere_else(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Compute Failed")


def _quiet(_text: str) -> None:
    """Ignore what is announced."""


@contextmanager
def connected(
    spec: ClusterSpec, *, folder: Path | None = None, announce: Callable[[str], None] = _quiet
) -> Iterator[Client]:
    """Connect to a cluster. One that is started here is closed at the end, a running one is left as it is.

    Args:
        spec: Where the workers are.
        folder: Folder for the logs of jobs, seen by every node. Default: `distinfluence-jobs` in the current folder.
        announce: Is called with what the queue does meanwhile. Default: nothing is said.

    Yields:
        A client of the cluster.

    Raises:
        ClusterError: If the scheduler does not answer, or jobs cannot work.
        MissingDependencyError: If this kind of cluster needs a package that is not installed.
    """
    if spec.kind in RUNNING:
        with _joined(spec) as client:
            yield client
    elif job_kind(spec.kind):
        with dask.config.set(PATIENCE):
            yield from _jobs(spec, folder or Path("distinfluence-jobs").absolute(), announce)
    else:
        settings: dict[str, object] = {
            f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in WORKER_ENVIRONMENT.items()
        }
        settings |= PATIENCE
        with dask.config.set(settings), _on_this_host(spec) as cluster, _kept(cluster), Client(cluster) as client:
            try:
                client.register_plugin(LeaveInterruptsToDriver())
                client.register_plugin(LeaveErrorsToDriver())
            except (CommClosedError, TimeoutError) as error:
                raise ClusterError(
                    f"the workers on this host end as they start, with `memory_limit` {spec.memory_limit!r}: {error}. "
                    "Give them the memory that Python with torch takes alone, half a gigabyte."
                ) from error
            yield client


def _jobs(spec: ClusterSpec, folder: Path, announce: Callable[[str], None]) -> Iterator[Client]:
    assert spec.workers is not None
    with job_cluster(
        spec.kind,
        (spec.minimum or spec.workers, spec.workers),
        spec.settings,
        timeout=spec.timeout,
        guarded=spec.on_death == "cancel",
        environment=WORKER_ENVIRONMENT,
        folder=folder,
        announce=announce,
    ) as client:
        yield client


def _on_this_host(spec: ClusterSpec) -> LocalCluster:
    loopback = f"{LOOPBACK}:0"
    common = {"host": LOOPBACK, "dashboard_address": loopback, "worker_dashboard_address": loopback}
    if spec.kind == "local":
        return LocalCluster(n_workers=spec.n_workers, threads_per_worker=1, memory_limit=spec.memory_limit, **common)
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise MissingDependencyError("a cluster of kind 'cuda' needs dask-cuda. Run: pip install dask-cuda") from error
    cluster: LocalCluster = LocalCUDACluster(
        n_workers=spec.workers, threads_per_worker=1, memory_limit=spec.memory_limit, **{**common, **spec.settings}
    )
    return cluster


@contextmanager
def _kept(cluster: LocalCluster) -> Iterator[None]:
    """Workers come back also when they died so early, or so slowly, that what watches over each of them gave it up.

    A nanny restarts a worker that dies, but not one that dies before it has reported; the cluster forgets a worker that
    is gone for `lost-worker-timeout`. Asked for the number that it should have, it starts those that it lacks.
    """
    assert cluster.loop is not None
    keeper = PeriodicCallback(lambda: cluster.scale(len(cluster.worker_spec)), KEEP_SECONDS * 1000)
    cluster.loop.add_callback(keeper.start)
    try:
        yield
    finally:
        cluster.loop.add_callback(keeper.stop)


def _joined(spec: ClusterSpec) -> Client:
    timeout = spec.timeout or ANSWER_SECONDS
    try:
        if spec.kind == "scheduler_file":
            return Client(scheduler_file=spec.address, timeout=timeout)
        return Client(spec.address, timeout=timeout)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(
            f"no scheduler answers at {spec.address}: {error}. Start one with `dask scheduler`, or correct `address`."
        ) from error
