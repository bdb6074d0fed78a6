"""Running many tasks with few in flight: in this process, or on a Dask cluster.

`run` yields results as they come and submits the next task only when one has finished, so that scheduler and client
stay small however many tasks there are. On a cluster a task that fails is tried again, one that takes far longer than
the others is started a second time elsewhere, and one that fails for good is set apart while the others go on.
Leaving the loop early (an error, Ctrl-C) cancels what is in flight.
"""

import asyncio
import math
import os
import queue
import socket
import statistics
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from dask.delayed import Delayed
from distributed import Client, Future, KilledWorker

from distinfluence.errors import ClusterError, DiskFullError
from distinfluence.scaling.sources import process_bytes
from distinfluence.solvers.auto import free_bytes

TASKS_PER_THREAD = 3  # in flight; two keep a worker busy, the third covers the way to the scheduler
RETRIES = 2  # of a task that raised, or whose workers died time after time
SLOW_FACTOR = 4.0  # times the usual way from submission to result, after which a task gets a backup
SLOW_SECONDS = 20.0  # and no sooner; also how long a worker may be silent until its tasks do
TICK_SECONDS = 1.0  # between looks at the clock and the cluster while nothing arrives

Task = Callable[..., Any]
Failures = dict[int, Exception]


class Executor(ABC):
    """Calls task(*shared, *item) for each item; dask tasks among an item's parts are computed first.

    events: how many tasks were "submitted", "retried", "backed up", "set apart".
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

        failures: given, items that fail for good are put there by number and the others go on; left out, the first
        one raises. What stops every task alike (a full disk, a lost scheduler) always raises.
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
                self.events["set apart"] += 1
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
    """Tasks on the workers of a Dask cluster, a window of them at a time.

    Shared arguments are sent once as tasks of their own, so that they survive the workers that hold them.
    resources: that a worker must have for these tasks, for instance {"GPU": 1}. slow_seconds: see SLOW_SECONDS.
    """

    def __init__(
        self, client: Client, *, resources: Mapping[str, float] | None = None, slow_seconds: float | None = None
    ) -> None:
        super().__init__()
        self.client = client
        self.resources = dict(resources) if resources else None
        self.slow_seconds = SLOW_SECONDS if slow_seconds is None else slow_seconds

    def run(
        self,
        task: Task,
        shared: tuple[object, ...],
        items: Sequence[tuple[object, ...]],
        failures: Failures | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """As they finish. Raises ClusterError if workers keep dying on a task or the scheduler is gone."""
        name = f"{task.__name__}-{uuid.uuid4().hex[:8]}"
        flight = _Flight(self, task, shared, items, name)
        try:
            yield from flight.results(failures)
        finally:
            with suppress(Exception):  # the scheduler may be what has gone
                self.client.cancel([*flight.futures(), *flight.sent], force=True)

    def send(self, value: object, key: str, workers: list[str] | None = None) -> "Future[Any]":
        """A value on the cluster, made by a task: if its holder dies it is made again."""
        extra: dict[str, Any] = {"workers": workers, "allow_other_workers": True} if workers else {}
        return self.client.submit(_itself, value, key=key, pure=False, **extra)


@dataclass
class _Flight:
    """The tasks of one `run`: which wait, which are under way and since when, which came back how often."""

    executor: OnCluster
    task: Task
    values: tuple[object, ...]
    items: Sequence[tuple[object, ...]]
    name: str
    sent: "list[Future[Any]]" = field(default_factory=list)
    arrived: "queue.SimpleQueue[tuple[Future[Any], Any]]" = field(default_factory=queue.SimpleQueue)
    under_way: dict[int, dict[str, "Future[Any]"]] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)
    backed_up: set[int] = field(default_factory=set)
    suspects: deque[int] = field(default_factory=deque)
    usual: deque[float] = field(default_factory=lambda: deque(maxlen=101))

    def futures(self) -> "list[Future[Any]]":
        """All that are under way."""
        return [future for own in self.under_way.values() for future in own.values()]

    def results(self, failures: Failures | None) -> Iterator[tuple[int, Any]]:
        """Fill the window, wait, yield, until nothing waits and nothing is under way."""
        waiting, window, looked = iter(range(len(self.items))), self._window(), time.monotonic()
        self._share()
        while True:
            while len(self.under_way) < window and (index := next(waiting, None)) is not None:
                self._submit(index)
            if not self.under_way and self.suspects:
                self._submit(self.suspects.popleft())
            if not self.under_way:
                return
            found = self._next()
            if time.monotonic() - looked > TICK_SECONDS:
                window, looked = self._window(), time.monotonic()
                self._back_up_stragglers()
            if found is None:
                continue
            future, result = found
            index = int(str(future.key).rsplit("-", 2)[1])
            if str(future.key) not in self.under_way.get(index, {}):
                continue  # a backup, or what was backed up, that came second
            error = self._error(future, index, result)
            if error is None:
                self.usual.append(time.monotonic() - self.since[index])
                self._forget(index)
                yield index, result
            elif error is not _AGAIN:
                self._forget(index)
                if failures is None:
                    raise error
                self.executor.events["set apart"] += 1
                failures[index] = error

    def _share(self, workers: list[str] | None = None) -> None:
        """Send what the tasks share; again where the worker that has it may stand still."""
        n = len(self.sent)
        self.sent += [
            self.executor.send(value, f"{self.name}-shared-{n + i}", workers) for i, value in enumerate(self.values)
        ]

    def _submit(self, index: int, workers: list[str] | None = None) -> None:
        client, item = self.executor.client, self.items[index]
        parts = [client.compute(part) if isinstance(part, Delayed) else part for part in item]
        number = self.attempts[index] = self.attempts[index] + 1
        key = f"{self.name}-{index}-{number}"
        extra: dict[str, Any] = {"workers": workers, "allow_other_workers": True} if workers else {}
        if self.executor.resources:
            extra["resources"] = self.executor.resources
        shared = self.sent[len(self.sent) - len(self.values) :]
        future = client.submit(self.task, *shared, *parts, key=key, pure=False, **extra)
        self.under_way.setdefault(index, {})[key] = future
        self.since.setdefault(index, time.monotonic())
        self.executor.events["submitted"] += 1
        future.add_done_callback(self._fetch)

    def _fetch(self, future: "Future[Any]") -> None:
        """Bring the result here without waiting for it: the worker that holds it may stand still."""

        async def fetch() -> None:
            result: Any = None
            try:
                if future.status == "finished":
                    result = await self.executor.client.gather(future, asynchronous=True)
            except BaseException as error:
                result = _Lost(error)
                raise
            finally:
                self.arrived.put((future, result))

        loop = self.executor.client.loop
        with suppress(RuntimeError):  # it has been closed: the run is over
            if loop is not None:
                asyncio.run_coroutine_threadsafe(fetch(), loop.asyncio_loop)  # type: ignore[attr-defined]

    def _next(self) -> "tuple[Future[Any], Any] | None":
        try:
            return self.arrived.get(timeout=TICK_SECONDS)
        except queue.Empty:
            if self.executor.client.status not in ("running", "connecting"):
                raise scheduler_is_gone() from None
            return None

    def _error(self, future: "Future[Any]", index: int, result: object) -> Exception | None:
        """None for a result, _AGAIN if the task goes on in another way, else what it failed with for good."""
        if future.status == "finished" and not isinstance(result, _Lost):
            return None
        if future.status != "error":  # cancelled or lost: the scheduler has gone, or somebody cancelled it
            if self.executor.client.status != "running":
                raise scheduler_is_gone()
            why = f": {result.error}" if isinstance(result, _Lost) else ", cancelled by somebody else"
            error: Exception = ClusterError(f"the task {future.key} came to nothing{why}.")
        else:
            found = future.exception()
            error = found if isinstance(found, Exception) else RuntimeError(str(found))
        if isinstance(error, DiskFullError):
            raise error  # it is full for all
        del self.under_way[index][str(future.key)]
        future.release()
        if self.under_way[index]:
            return _AGAIN
        if self.attempts[index] - (index in self.backed_up) <= RETRIES:
            self.executor.events["retried"] += 1
            if isinstance(error, KilledWorker):
                # perhaps only beside the task that kills: alone, when the others are done, it will be seen
                self._forget(index)
                self.suspects.append(index)
            else:
                self._submit(index)
            return _AGAIN
        return killed(error) if isinstance(error, KilledWorker) else error

    def _forget(self, index: int) -> None:
        for future in self.under_way.pop(index, {}).values():
            if not future.done():
                future.cancel(force=True)
            future.release()
        self.since.pop(index, None)

    def _back_up_stragglers(self) -> None:
        """Start again elsewhere what takes far longer than usual, or waits for a worker that is not heard of."""
        client, now, slow = self.executor.client, time.monotonic(), self.executor.slow_seconds
        old = {i for i in self.under_way if i not in self.backed_up and now - self.since[i] > slow}
        if not old:
            return
        limit = max(slow, SLOW_FACTOR * statistics.median(self.usual)) if self.usual else math.inf
        seen = {a: w["last_seen"] for a, w in client.scheduler_info(n_workers=-1)["workers"].items()}
        silent = {address for address, at in seen.items() if max(seen.values()) - at > slow}
        processing = client.processing()
        others: list[str] = []
        for index in sorted(old):
            keys = set(self.under_way[index])
            busy = {worker for worker, own in processing.items() if set(map(str, own)) & keys}
            # done, and the result does not come
            busy |= {w for held in client.who_has(list(self.under_way[index].values())).values() for w in held}
            if not busy & silent and now - self.since[index] <= limit:
                continue
            elsewhere = sorted(set(processing) - busy - silent)
            if busy and elsewhere:
                if elsewhere != others:
                    self._share(others := elsewhere)
                self.executor.events["backed up"] += 1
                self.backed_up.add(index)
                self._submit(index, elsewhere)

    def _window(self) -> int:
        if self.executor.resources:
            return max(2, TASKS_PER_THREAD * len(able_workers(self.executor.client, self.executor.resources)))
        return max(2, TASKS_PER_THREAD * int(sum(self.executor.client.nthreads().values())))


_AGAIN = Exception()


@dataclass(frozen=True)
class _Lost:
    """In place of a result that could not be fetched."""

    error: BaseException


def killed(error: KilledWorker) -> ClusterError:
    """What to raise for a task that workers keep dying on."""
    return ClusterError(
        f"a task killed several workers in a row: {error}. Usually memory: use smaller chunks, or workers with a "
        "higher memory limit. What was written stays; go on with resume."
    )


def scheduler_is_gone() -> ClusterError:
    """What to raise when the scheduler does not answer any more."""
    return ClusterError("the scheduler is gone. What was written stays: start the cluster again and go on with resume.")


def _itself(value: object) -> object:
    return value


@dataclass(frozen=True)
class WorkersSeen:
    """n_threads: of torch that a task may use, a worker's share of its host's cores. process: bytes of an idle one."""

    n_threads: int
    process: int


def check_workers(client: Client, folder: str, timeout: float) -> WorkersSeen:
    """Look at every worker.

    folder: a file in it must be visible to every worker. Raises ClusterError without workers after `timeout` seconds,
    or if a worker does not see the folder.
    """
    try:
        client.wait_for_workers(1, timeout=timeout)
    except TimeoutError:
        raise ClusterError(
            f"the cluster has no workers after {timeout:g} s: {client}. Start workers, or look at their logs."
        ) from None
    seen = client.run(_look_around, folder)
    blind = [address for address, (_, _, sees, _) in seen.items() if not sees]
    if blind:
        raise ClusterError(
            f"`scratch` must be a folder that every worker sees; {folder} is not there for {blind[:3]}. Pass a folder "
            "on a shared file system."
        )
    hosts = [host for host, *_ in seen.values()]
    shares = [int(cores // hosts.count(host)) for host, cores, *_ in seen.values()]
    return WorkersSeen(max(1, min(shares)), max(own for *_, own in seen.values()))


def able_workers(client: Client, resources: Mapping[str, float]) -> list[str]:
    """Addresses of the workers that have these resources."""
    if not resources:
        return sorted(client.nthreads())
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return sorted(
        address
        for address, worker in workers.items()
        if all(worker["resources"].get(name, 0) >= amount for name, amount in resources.items())
    )


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
    limits = [int(worker["memory_limit"] or 0) for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    return min(limit or free_bytes(torch.device("cpu")) // max(1, len(limits)) for limit in limits)


def _look_around(folder: str) -> tuple[str, int, bool, int]:
    place, cores = socket.gethostname(), len(os.sched_getaffinity(0))
    granted = os.environ.get("SLURM_CPUS_PER_TASK")
    if granted:  # a batch job shares its cores with nobody, and not every site confines it to them
        place = f"{place}, job {os.environ.get('SLURM_JOB_ID')}, task {os.environ.get('SLURM_PROCID')}"
        cores = min(cores, int(granted))
    return place, cores, os.path.isdir(folder), process_bytes()
