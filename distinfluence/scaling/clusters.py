"""Clusters by description: a local one, or one that is running already."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import dask
import torch
from distributed import Client, LocalCluster, Worker, WorkerPlugin
from distributed.worker_memory import parse_memory_limit

from distinfluence.errors import ClusterError, SettingError
from distinfluence.solvers.auto import free_bytes

# Dask has its workers give memory back to the system at once, so that every large tensor costs page faults anew: ten
# times as many in a pass over the training set (tests/benchmarks/passes.py). These are glibc's thresholds as it would
# grow them by itself.
WORKER_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}

ALLOWED_FAILURES = 10  # workers that may die on a task, or beside it, before it is suspected

LOOPBACK = "127.0.0.1"
KINDS = ("local", "address", "scheduler_file")


@dataclass(frozen=True)
class ClusterSpec:
    """Where the workers are.

    kind: "local" starts `workers` processes of one thread on this host, listening on the loopback interface only;
    "address" and "scheduler_file" join a running scheduler at `address` (tcp://…, or the file's path).
    memory_limit: of each local worker, as Dask reads it ("auto": its share of the host). timeout: seconds to wait for
    the scheduler and the first worker.
    """

    kind: str = "local"
    workers: int = 2
    memory_limit: str = "auto"
    address: str = ""
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"`kind` of the cluster must be one of {list(KINDS)}, got {self.kind!r}.")
        if self.workers < 1:
            raise SettingError(f"`workers` must be at least 1, got {self.workers}.")
        if self.kind != "local" and not self.address:
            raise SettingError(f"`address` must say where the scheduler is for a cluster of kind {self.kind!r}.")


def local_memory(spec: ClusterSpec) -> int:
    """Bytes that each worker of a local cluster will be given."""
    limit = parse_memory_limit(spec.memory_limit, 1, os.cpu_count() or 1, logger=logging.getLogger(__name__))
    return int(limit or free_bytes(torch.device("cpu")))


class LeaveInterruptsToDriver(WorkerPlugin):
    """Ctrl-C reaches every process of the terminal: only the driver acts on it, and stops the workers in good order."""

    name = "distinfluence-leave-interrupts-to-driver"

    def setup(self, worker: Worker) -> None:
        """Ignore SIGINT, where this thread may say so."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def connected(spec: ClusterSpec) -> Iterator[Client]:
    """A client of the cluster; one that was started here is closed at the end, a running one is left as it is.

    Raises ClusterError if the scheduler does not answer.
    """
    if spec.kind == "local":
        settings: dict[str, object] = {
            f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in WORKER_ENVIRONMENT.items()
        }
        # a long torch call may hold up a worker's heartbeat: that is no reason to give up on it
        settings["distributed.scheduler.worker-ttl"] = "15 minutes"
        settings["distributed.scheduler.allowed-failures"] = ALLOWED_FAILURES
        with (
            dask.config.set(settings),
            LocalCluster(
                n_workers=spec.workers,
                threads_per_worker=1,
                memory_limit=spec.memory_limit,
                host=LOOPBACK,
                dashboard_address=f"{LOOPBACK}:0",
                worker_dashboard_address=f"{LOOPBACK}:0",
            ) as cluster,
            Client(cluster) as client,
        ):
            client.register_plugin(LeaveInterruptsToDriver())
            yield client
        return
    try:
        client = (
            Client(scheduler_file=spec.address, timeout=spec.timeout)
            if spec.kind == "scheduler_file"
            else Client(spec.address, timeout=spec.timeout)
        )
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(
            f"no scheduler answers at {spec.address}: {error}. Start one with `dask scheduler`, or correct `address`."
        ) from error
    with client:
        yield client
