"""Running many tasks with few in flight: in this process, or on a Dask cluster.

`run` yields results as they come and submits the next task only when one has finished, so that scheduler and client
stay small however many tasks there are. Leaving the loop early (an error, Ctrl-C) cancels what is in flight.
"""

import os
import socket
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dask.delayed import Delayed
from distributed import Client, Future, KilledWorker, as_completed

from distinfluence.errors import ClusterError

TASKS_PER_THREAD = 3  # in flight; two keep a worker busy, the third covers the way to the scheduler

Task = Callable[..., Any]


class Executor(ABC):
    """Calls task(*shared, *item) for each item; dask tasks among an item's parts are computed first."""

    @abstractmethod
    def run(
        self, task: Task, shared: tuple[object, ...], items: Sequence[tuple[object, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number of the item, result) as results come, in any order."""


class InProcess(Executor):
    """One task after the other, here."""

    def run(
        self, task: Task, shared: tuple[object, ...], items: Sequence[tuple[object, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """In the order of the items."""
        for index, item in enumerate(items):
            yield index, task(*shared, *(part.compute() if isinstance(part, Delayed) else part for part in item))


class OnCluster(Executor):
    """Tasks on the workers of a Dask cluster, a window of them at a time.

    Shared arguments are sent once as tasks of their own, so that they survive the workers that hold them.
    """

    def __init__(self, client: Client) -> None:
        self.client = client

    def run(
        self, task: Task, shared: tuple[object, ...], items: Sequence[tuple[object, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """As they finish. Raises ClusterError if workers keep dying on a task; the task's own errors as they are."""
        name = f"{task.__name__}-{uuid.uuid4().hex[:8]}"
        sent = tuple(self.send(value, f"{name}-shared-{n}") for n, value in enumerate(shared))
        waiting = iter(enumerate(items))
        numbers: dict[Any, int] = {}
        finished = as_completed(with_results=False, raise_errors=False)

        def submit_next() -> None:
            for index, item in waiting:
                parts = [self.client.compute(part) if isinstance(part, Delayed) else part for part in item]
                future = self.client.submit(task, *sent, *parts, key=f"{name}-{index}", pure=False)
                numbers[future.key] = index
                finished.add(future)
                return

        try:
            for _ in range(self._window()):
                submit_next()
            for future in finished:
                yield numbers[future.key], self._result(future)
                future.release()
                submit_next()
        finally:
            self.client.cancel([*finished.futures, *sent], force=True)

    def send(self, value: object, key: str) -> "Future[Any]":
        """A value on the cluster, made by a task: if its holder dies it is made again."""
        return self.client.submit(_itself, value, key=key, pure=False)

    def _window(self) -> int:
        return max(2, TASKS_PER_THREAD * int(sum(self.client.nthreads().values())))

    def _result(self, future: "Future[Any]") -> Any:
        try:
            return future.result()
        except KilledWorker as error:
            raise ClusterError(
                f"a task killed several workers in a row: {error}. Usually memory: use smaller chunks, or workers "
                "with a higher memory limit. What was written stays; go on with resume."
            ) from error


def _itself(value: object) -> object:
    return value


def check_workers(client: Client, folder: str, timeout: float) -> int:
    """Threads of torch that a task may use: a worker's share of its host's cores.

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
    blind = [address for address, (_, _, sees) in seen.items() if not sees]
    if blind:
        raise ClusterError(
            f"`scratch` must be a folder that every worker sees; {folder} is not there for {blind[:3]}. Pass a folder "
            "on a shared file system."
        )
    hosts = [host for host, _, _ in seen.values()]
    shares = [int(cores // hosts.count(host)) for host, cores, _ in seen.values()]
    return max(1, min(shares))


def _look_around(folder: str) -> tuple[str, int, bool]:
    return socket.gethostname(), len(os.sched_getaffinity(0)), os.path.isdir(folder)
