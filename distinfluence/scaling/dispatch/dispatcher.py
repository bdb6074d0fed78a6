"""The tasks of one run on a cluster: few under way, failures tried again, what stands still started elsewhere.

An `Agenda` says what is to be done and in which order; a `Dispatcher` submits it, waits, and sees to what goes wrong.
Workers that die are the scheduler's business, which runs again what they ran and makes again what they held. Workers
that are only silent are not: they may come back. What they run and what only they hold is made a second time elsewhere,
and the first to finish wins.
"""

import asyncio
import math
import queue
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dask.delayed import Delayed
from distributed import Client, Future, KilledWorker

from distinfluence.errors import ClusterError, DiskFullError
from distinfluence.scaling.dispatch.agenda import Agenda, Failures, Task
from distinfluence.scaling.dispatch.stragglers import Stragglers, UnderWay, all_workers

TASKS_PER_THREAD = 3  # in flight; two keep a worker busy, the third covers the way to the scheduler
RETRIES = 2  # of a task that raised, or whose workers died time after time
TICK_SECONDS = 1.0  # between looks at the clock and the cluster while nothing arrives


@dataclass
class Dispatcher:
    """The tasks of an agenda: which are under way and since when, which came back how often.

    The values in `shared`, which tasks have in common, are sent once. They are sent as tasks of their own, so that they
    survive the workers that hold them. A worker must have `resources`. `events` counts what happens.
    """

    client: Client
    agenda: Agenda
    shared: tuple[object, ...]
    name: str
    resources: Mapping[str, float]
    events: Counter[str]
    stragglers: Stragglers
    sent: "list[Future[Any]]" = field(default_factory=list)
    arrived: "queue.SimpleQueue[tuple[Future[Any], Any]]" = field(default_factory=queue.SimpleQueue)
    under_way: dict[int, UnderWay] = field(default_factory=dict)
    numbers: Counter[int] = field(default_factory=Counter)
    failed: Counter[int] = field(default_factory=Counter)
    window: int = 2
    workers: list[str] = field(default_factory=list)

    def results(self, failures: Failures | None) -> Iterator[tuple[int, Any]]:
        """Fill the window, wait, yield, until nothing waits and nothing is under way.

        What goes on at the end, come what may, is cancelled.
        """
        try:
            yield from self._results(failures)
        finally:
            with suppress(Exception):  # the scheduler may be what has gone
                own = [future for task in self.under_way.values() for future in task.copies.values()]
                self.client.cancel([*own, *self.agenda.kept().values(), *self.sent], force=True)

    def _results(self, failures: Failures | None) -> Iterator[tuple[int, Any]]:
        silent = self.stragglers.silent
        if silent:
            self.stragglers.look()
        self._see_workers()
        looked = time.monotonic()
        self._share(self.workers if silent else None)
        while True:
            while (index := self.agenda.next(len(self.under_way), self.window)) is not None:
                self._submit(index)
            if not self.under_way:
                return
            found = self._arrival()
            if time.monotonic() - looked > TICK_SECONDS:
                self._see_workers()
                self._back_up_stragglers()
                looked = time.monotonic()
            if found is None:
                continue
            future, result = found
            index = int(str(future.key).rsplit("-", 2)[1])
            if index not in self.under_way or str(future.key) not in self.under_way[index].copies:
                continue  # a backup, or what was backed up, that came second
            error = self._error(future, index, result)
            if error is None:
                self.stragglers.usual.append(time.monotonic() - self.under_way[index].since)
                self._forget(index, but=future if self.agenda.keeps(index) else None)
                self.agenda.finished(index, future)
                if not self.agenda.keeps(index):
                    yield index, result
            elif error is not _AGAIN:
                self._forget(index)
                if failures is None:
                    raise error
                self.events["quarantined"] += 1
                failures[index] = error

    def _see_workers(self) -> None:
        threads = able_workers(self.client, self.resources)
        self.workers = sorted(set(threads) - self.stragglers.silent)
        self.window = max(2, TASKS_PER_THREAD * sum(threads.values()))
        self.agenda.see(self.workers)

    def _share(self, workers: list[str] | None = None) -> None:
        """Send what the tasks share; again where the worker that has it may stand still."""
        n = len(self.sent)
        self.sent += [
            send(self.client, value, f"{self.name}-shared-{n + i}", workers) for i, value in enumerate(self.shared)
        ]

    def _latest_sent(self) -> "list[Future[Any]]":
        return self.sent[len(self.sent) - len(self.shared) :]

    def _submit(self, index: int, workers: list[str] | None = None, in_one: bool = False) -> None:
        """Send a task. in_one: whoever runs it makes its lazy arguments too."""
        client, call = self.client, self.agenda.call(index)
        run, arguments, parts = call.task, list(call.arguments), list[Future[Any]]()
        for place, argument in enumerate(arguments):
            if isinstance(argument, Delayed) and in_one:
                run, arguments[place] = partial(_in_one, call.task), _Lazy(argument)
            elif isinstance(argument, Delayed):
                arguments[place] = part = client.compute(argument)
                parts.append(part)
        shared = self._latest_sent() if call.with_shared else []
        self.numbers[index] += 1
        key = f"{call.task.__name__}-{self.name}-{index}-{self.numbers[index]}"
        extra: dict[str, Any] = {"resources": dict(self.resources)} if self.resources else {}
        # no worker that is not heard of gets more to do
        asked = workers or call.workers or (self.workers if self.stragglers.silent else None)
        if asked:
            extra |= {"workers": asked, "allow_other_workers": True}
        future = client.submit(run, *shared, *arguments, key=key, pure=False, priority=call.priority, **extra)
        task = self.under_way.setdefault(index, UnderWay(time.monotonic()))
        task.add(key, future, len(self.sent) if call.with_shared else math.inf, parts)
        self.events["submitted"] += 1
        future.add_done_callback(self._note if self.agenda.keeps(index) else self._fetch)

    def _note(self, future: "Future[Any]") -> None:
        self.arrived.put((future, None))

    def _fetch(self, future: "Future[Any]") -> None:
        """Bring the result here without waiting for it: the worker that holds it may stand still."""

        async def fetch() -> None:
            result: Any = _Lost(None)
            try:
                if future.status not in ("error", "cancelled"):
                    result = await self._fetched(future)
            except BaseException as error:
                result = _Lost(error)
                raise
            finally:
                self.arrived.put((future, result))

        loop = self.client.loop
        with suppress(RuntimeError):  # it has been closed: the run is over
            if loop is not None:
                self.stragglers.asked_for[str(future.key)] = time.monotonic()
                asyncio.run_coroutine_threadsafe(fetch(), loop.asyncio_loop)  # type: ignore[attr-defined]

    async def _fetched(self, future: "Future[Any]") -> Any:
        """Fetch one result by itself: `gather` puts several in one request, which ends when all holders answer."""
        if future.status == "finished":
            answer = await self.client.scheduler.gather(keys=[future.key])  # type: ignore[union-attr]
            if answer["status"] == "OK":
                return answer["data"][future.key]
        # its holder has left: it is being made again, and gathered when it is there
        return await self.client.gather(future, asynchronous=True)

    def _arrival(self) -> "tuple[Future[Any], Any] | None":
        try:
            return self.arrived.get(timeout=TICK_SECONDS)
        except queue.Empty:
            if self.client.status not in ("running", "connecting"):
                raise scheduler_is_gone() from None
            return None

    def _error(self, future: "Future[Any]", index: int, result: object) -> Exception | None:
        """None for a result, _AGAIN if the task goes on in another way, else what it failed with for good."""
        if self.agenda.keeps(index):
            made_again = future.status in ("lost", "pending") and self.client.status == "running"
            if future.status == "finished" or made_again:  # as its holder died just now
                return None
        elif not isinstance(result, _Lost):
            return None  # it is here, whatever has become of its holder
        if future.status != "error":  # cancelled or lost: the scheduler has gone, or somebody cancelled it
            if self.client.status != "running":
                raise scheduler_is_gone()
            fetching = result.error if isinstance(result, _Lost) else None
            why = ", cancelled by somebody else" if fetching is None else f": {fetching}"
            error: Exception = ClusterError(f"the task {future.key} came to nothing{why}.")
        else:
            found = future.exception()
            error = found if isinstance(found, Exception) else RuntimeError(str(found))
        if isinstance(error, DiskFullError):
            raise error  # a full disk is full for all
        del self.under_way[index].copies[str(future.key)]
        future.release()
        if self.under_way[index].copies:
            return _AGAIN
        self.failed[index] += 1
        if self.failed[index] <= RETRIES:
            self.events["retried"] += 1
            self._forget(index)
            # the task that workers died on was perhaps only next to the one that kills: alone, that will be seen
            self.agenda.again(index, alone=isinstance(error, KilledWorker))
            return _AGAIN
        return killed(error) if isinstance(error, KilledWorker) else error

    def _forget(self, index: int, but: "Future[Any] | None" = None) -> None:
        task = self.under_way.pop(index, None)
        for future in task.copies.values() if task else ():
            if future is but:
                continue
            if not future.done():
                future.cancel(force=True)
            future.release()

    def _back_up_stragglers(self) -> None:
        """Start again elsewhere what takes far longer than usual, or waits for a worker that is not heard of."""
        stragglers = self.stragglers
        old = stragglers.old(self.under_way)
        if not old and not stragglers.silent:
            return
        stragglers.look()
        if stragglers.silent:
            self._see_workers()
            self._make_again_what_cannot_be_had()
        if self.workers and stragglers.not_to_be_had(self._latest_sent()):
            self._share(self.workers)
        for index in old:
            if index not in self.under_way:
                continue
            task = self.under_way[index]
            # what it was given could be had of nobody, so that it waits, on whichever worker it is
            in_one = bool(stragglers.not_to_be_had(task.parts))
            waits = in_one or task.given < len(self.sent)
            elsewhere = self.workers if waits else stragglers.elsewhere(task, self.workers)
            if elsewhere:
                self.events["backed up"] += 1
                task.backed_up = True
                self._submit(index, elsewhere, in_one)

    def _make_again_what_cannot_be_had(self) -> None:
        kept = self.agenda.kept()
        stuck = {future.key for future in self.stragglers.not_to_be_had(kept.values())}
        for index, future in kept.items():
            if future.key in stuck:
                self.events["made again"] += 1
                for waiting in self.agenda.lost(index):
                    self._forget(waiting)


_AGAIN = Exception()


@dataclass(frozen=True)
class _Lost:
    """In place of a result that could not be fetched. error: why; None if it was not tried, as there is none."""

    error: BaseException | None


@dataclass(frozen=True)
class _Lazy:
    """A lazy argument that travels as it is."""

    part: Delayed


def _in_one(task: Task, *arguments: object) -> Any:
    """Run a task whose lazy arguments are made first, here."""
    return task(*(a.part.compute(scheduler="synchronous") if isinstance(a, _Lazy) else a for a in arguments))


def able_workers(client: Client, resources: Mapping[str, float]) -> dict[str, int]:
    """Address → threads of the workers that have these resources; with resources, one task each at a time."""
    if not resources:
        return dict(client.nthreads())
    return {
        address: 1
        for address, worker in all_workers(client).items()
        if all(worker["resources"].get(name, 0) >= amount for name, amount in resources.items())
    }


def send(client: Client, value: object, key: str, workers: list[str] | None = None) -> "Future[Any]":
    """Put a value on the cluster, made by a task: if its holder dies it is made again."""
    extra: dict[str, Any] = {"workers": workers, "allow_other_workers": True} if workers else {}
    return client.submit(_itself, value, key=key, pure=False, **extra)


def _itself(value: object) -> object:
    return value


def killed(error: KilledWorker) -> ClusterError:
    """Return what to raise for a task that workers keep dying on."""
    return ClusterError(
        f"a task killed several workers in a row: {error}. Usually memory: use smaller chunks, or workers with a "
        "higher memory limit. What was written stays; go on with resume."
    )


def scheduler_is_gone() -> ClusterError:
    """Return what to raise when the scheduler does not answer any more."""
    return ClusterError("the scheduler is gone. What was written stays: start the cluster again and go on with resume.")
