"""Running many tasks with few in flight: in this process, or on a Dask cluster.

`run` yields results as they come and submits the next task only when one has finished, so that scheduler and client
stay small however many tasks there are. On a cluster a task that fails is tried again, one that takes far longer than
the others is started a second time elsewhere, and one that fails for good is quarantined while the others go on.
Leaving the loop early (an error, Ctrl-C) cancels what is in flight.
"""

import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dask.delayed import Delayed
from distributed import Client

from distinfluence.errors import ClusterError, DiskFullError
from distinfluence.memory import free_bytes, process_bytes
from distinfluence.scaling.dispatch.agenda import Agenda, Failures, Task, TaskQueue
from distinfluence.scaling.dispatch.dispatcher import RETRIES, Dispatcher, able_workers
from distinfluence.scaling.dispatch.stragglers import SLOW_SECONDS, Stragglers, all_workers


class Executor(ABC):
    """Calls task(*shared, *item) for each item; dask tasks among an item's parts are computed first.

    events: how many tasks were "submitted", "retried", "backed up", "quarantined".
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()

    @abstractmethod
    def run(
        self,
        task: Task,
        shared: tuple[object, ...],
        items: Sequence[tuple[object, ...]],
        failures: Failures | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number of the item, result) as results come, in any order.

        If `failures` is given, items that fail for good are put there by number and the others go on. Otherwise the
        first failure is raised. What stops every task alike (a full disk, a lost scheduler) is always raised.
        """


class InProcess(Executor):
    """One task after the other, here."""

    def run(
        self,
        task: Task,
        shared: tuple[object, ...],
        items: Sequence[tuple[object, ...]],
        failures: Failures | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """In the order of the items."""
        for index, item in enumerate(items):
            try:
                result = self._attempted(task, shared, item)
            except Exception as error:
                if failures is None or isinstance(error, DiskFullError):
                    raise
                self.events["quarantined"] += 1
                failures[index] = error
                continue
            yield index, result

    def _attempted(self, task: Task, shared: tuple[object, ...], item: tuple[object, ...]) -> Any:
        for left in reversed(range(RETRIES + 1)):
            self.events["submitted"] += 1
            try:
                return task(*shared, *(part.compute() if isinstance(part, Delayed) else part for part in item))
            except Exception as error:
                if not left or isinstance(error, DiskFullError):
                    raise
                self.events["retried"] += 1


class OnCluster(Executor):
    """Tasks on the workers of a Dask cluster, a window of them at a time; see `dispatcher`.

    Args:
        client: A client of the cluster.
        resources: Resources that a worker must have for these tasks, for instance {"GPU": 1}; none by default.
        slow_seconds: By default SLOW_SECONDS, see there.
    """

    def __init__(
        self, client: Client, *, resources: Mapping[str, float] | None = None, slow_seconds: float | None = None
    ) -> None:
        super().__init__()
        self.client = client
        self.resources = dict(resources or {})
        self.slow_seconds = SLOW_SECONDS if slow_seconds is None else slow_seconds
        self._silent: set[str] = set()

    def run(
        self,
        task: Task,
        shared: tuple[object, ...],
        items: Sequence[tuple[object, ...]],
        failures: Failures | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """As they finish. Raises ClusterError if workers keep dying on a task or the scheduler is gone."""
        yield from self.follow(TaskQueue(task, items), shared, failures)

    def follow(
        self, agenda: Agenda, shared: tuple[object, ...] = (), failures: Failures | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Do what an agenda says; yields as `run` does."""
        name = uuid.uuid4().hex[:8]
        stragglers = Stragglers(self.client, self.slow_seconds, self._silent)
        dispatcher = Dispatcher(self.client, agenda, shared, name, self.resources, self.events, stragglers)
        yield from dispatcher.results(failures)


@dataclass(frozen=True)
class WorkersSeen:
    """n_threads: of torch that a task may use, a worker's share of its host's cores. process: bytes of an idle one."""

    n_threads: int
    process: int


def check_client(client: Client) -> None:
    """Raise ClusterError for a client that nothing can be submitted with from here."""
    if client.asynchronous:
        raise ClusterError(
            "`client` must be synchronous, got one that was made with asynchronous=True, or is used in its own event "
            "loop. Make one with `Client(address)` in a thread without a running loop."
        )
    if client.status in ("closed", "closing"):
        raise ClusterError(f"`client` must be open, got one that is {client.status}. Make another: `Client(cluster)`.")


def check_workers(client: Client, folder: str, timeout: float) -> WorkersSeen:
    """Look at every worker.

    Args:
        client: A client of the cluster.
        folder: A folder that every worker must see.
        timeout: Seconds to wait for workers.

    Raises:
        ClusterError: There are no workers after `timeout` seconds, or a worker does not see the folder.
    """
    end = time.monotonic() + timeout
    seen: dict[str, tuple[str, int, bool, int]] = {}
    while not seen:  # those that were there may all have gone again before they answered
        try:
            client.wait_for_workers(1, timeout=max(0.1, end - time.monotonic()))
        except TimeoutError:
            raise ClusterError(
                f"the cluster has no workers after {timeout:g} s: {client}. Start workers, or look at their logs."
            ) from None
        # one that dies at this moment is replaced, and no reason to end the run
        answers = client.run(_look_around, folder, on_error="return")
        seen = {address: answer for address, answer in answers.items() if not isinstance(answer, Exception)}
        if not seen and answers and time.monotonic() > end:
            raise ClusterError(f"no worker of {client} answers: {next(iter(answers.values()))}. Look at their logs.")
    blind = [address for address, (_, _, sees, _) in seen.items() if not sees]
    if blind:
        raise ClusterError(
            f"`scratch` must be a folder that every worker sees; {folder} is not there for {blind[:3]}. Pass a folder "
            "on a shared file system."
        )
    hosts = [host for host, *_ in seen.values()]
    shares = [int(cores // hosts.count(host)) for host, cores, *_ in seen.values()]
    return WorkersSeen(max(1, min(shares)), max(own for *_, own in seen.values()))


def check_resources(client: Client, resources: Mapping[str, float]) -> None:
    """Raise ClusterError if workers are there and none has the resources: its tasks would wait for ever, silently."""
    if client.nthreads() and not able_workers(client, resources):
        asked = ",".join(f"{name}={amount:g}" for name, amount in resources.items())
        raise ClusterError(
            f"`resources` {dict(resources)} must be had by a worker, and none of {len(client.nthreads())} has them. "
            f"Start workers with `--resources {asked}`."
        )


def worker_memory(client: Client) -> int:
    """Bytes that the smallest worker may take; its share of the free memory here where it has no limit."""
    limits = [int(worker["memory_limit"] or 0) for worker in all_workers(client).values()]
    if not limits:
        raise ClusterError(f"the cluster has no workers any more: {client}. Look at their logs.")
    return min(limit or free_bytes(torch.device("cpu")) // max(1, len(limits)) for limit in limits)


def _look_around(folder: str) -> tuple[str, int, bool, int]:
    place, cores = socket.gethostname(), len(os.sched_getaffinity(0))
    granted = os.environ.get("SLURM_CPUS_PER_TASK")
    if granted:  # a batch job shares its cores with nobody, and not every site confines it to them
        place = f"{place}, job {os.environ.get('SLURM_JOB_ID')}, task {os.environ.get('SLURM_PROCID')}"
        cores = min(cores, int(granted))
    return place, cores, os.path.isdir(folder), process_bytes()
