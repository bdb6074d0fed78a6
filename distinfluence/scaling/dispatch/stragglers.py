"""Which tasks are started a second time: those that take far longer than usual, or that a silent worker keeps back."""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Future

SLOW_FACTOR = 4.0  # times the usual way from submission to result, after which a task gets a backup
SLOW_SECONDS = 20.0  # and no sooner; also how long a worker may be silent, or a result on its way, until a task does


@dataclass
class UnderWay:
    """A task that was sent and has not come back.

    since: when it was first. copies: by key. latest: when the last was sent. given: how many values had been shared by
    then; ∞ if it needs none. parts: lazy arguments of the last that the cluster makes.
    """

    since: float
    copies: "dict[str, Future[Any]]" = field(default_factory=dict)
    latest: float = 0.0
    given: float = 0.0
    parts: "list[Future[Any]]" = field(default_factory=list)
    backed_up: bool = False

    def add(self, key: str, future: "Future[Any]", given: float, parts: "list[Future[Any]]") -> None:
        """One more copy, sent now."""
        self.copies[key] = future
        self.latest, self.given, self.parts = time.monotonic(), given, parts


@dataclass
class Stragglers:
    """What a dispatcher knows of time and of who is heard of.

    silent: workers that were not heard of in an earlier dispatcher, to be kept up to date. usual: seconds of the last
    tasks. asked_for: when a result was, by the key of its task.
    """

    client: Client
    slow_seconds: float
    silent: set[str]
    usual: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    asked_for: dict[str, float] = field(default_factory=dict)
    processing: Mapping[str, Sequence[object]] = field(default_factory=dict)

    def look(self) -> None:
        """Ask the scheduler who is heard of, and what each worker runs."""
        seen = {address: worker["last_seen"] for address, worker in all_workers(self.client).items()}
        self.silent.clear()
        self.silent.update(a for a, at in seen.items() if max(seen.values()) - at > self.slow_seconds)
        self.processing = self.client.processing()

    def old(self, under_way: Mapping[int, UnderWay]) -> list[int]:
        """Return the tasks that are worth a look."""
        now = time.monotonic()
        return [index for index in sorted(under_way) if now - under_way[index].latest > self.slow_seconds]

    def elsewhere(self, task: UnderWay, workers: Sequence[str]) -> list[str]:
        """Those of the workers on which a task is to be started again; none if it is to be waited for."""
        now, on = time.monotonic(), self._on(task)
        busy = set[str]().union(*on.values())
        not_coming = {
            key
            for key, copy in task.copies.items()
            if copy.status == "finished" and now - self.asked_for.get(key, now) > self.slow_seconds
        }
        hopeful = set[str]().union(*(on[key] for key in on if key not in not_coming))
        limit = max(self.slow_seconds, SLOW_FACTOR * statistics.median(self.usual)) if self.usual else math.inf
        slow = bool(busy) and now - task.since > limit and not task.backed_up
        if not slow and not ((busy or not_coming) and hopeful <= self.silent):
            return []
        # the holder of a result that does not come may be the only worker that is heard of
        return sorted(set(workers) - busy) or (list(workers) if not_coming else [])

    def _on(self, task: UnderWay) -> dict[str, set[str]]:
        """Key of a copy → the workers that run it, or have done it while its result does not come."""
        on = {str(key): set(held) for key, held in self.client.who_has(list(task.copies.values())).items()}
        for worker, keys in self.processing.items():
            for key in task.copies.keys() & set(map(str, keys)):
                on.setdefault(key, set()).add(worker)
        return on

    def not_to_be_had(self, futures: "Iterable[Future[Any]]") -> "list[Future[Any]]":
        """Those that only silent workers hold, or that one of them is to make."""
        futures = list(futures)
        if not futures or not self.silent:
            return []
        making = {str(key) for worker in self.silent for key in self.processing.get(worker, ())}
        held = {str(key): set(workers) for key, workers in self.client.who_has(futures).items()}
        found = []
        for future in futures:
            key, holders = str(future.key), held.get(str(future.key), set())
            if holders <= self.silent and (holders or key in making):
                found.append(future)
        return found


def all_workers(client: Client) -> Mapping[str, Any]:
    """Address → what the scheduler says of that worker.

    Not from `scheduler_info`: the client itself replaces what that returns every two seconds, by one without workers.
    """
    found: Mapping[str, Any] = client.sync(client.scheduler.identity, n_workers=-1)["workers"]  # type: ignore[union-attr]
    return found
