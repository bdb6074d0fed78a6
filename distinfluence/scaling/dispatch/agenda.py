"""What has to be done and in which order, whoever does it."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Future

Task = Callable[..., Any]


Failures = dict[int, Exception]


@dataclass(frozen=True)
class Call:
    """A task with its own arguments; those that all share come first. workers: where it should run, None: anywhere."""

    task: Task
    arguments: tuple[object, ...]
    with_shared: bool = True
    workers: list[str] | None = None
    priority: int = 0


class Agenda(ABC):
    """What a dispatcher is to do, as tasks with numbers."""

    def __init__(self) -> None:
        self._alone: deque[int] = deque()  # to be tried when nothing else is left

    def next(self, under_way: int, window: int) -> int | None:
        """Return the next task, None if none may start. under_way: tasks, of `window` that there should be."""
        found = self._next(under_way, window)
        return self._alone.popleft() if found is None and not under_way and self._alone else found

    @abstractmethod
    def _next(self, under_way: int, window: int) -> int | None:
        """Return the same as `next`, except tasks that are to be tried alone."""

    @abstractmethod
    def call(self, index: int) -> Call:
        """Return how a task is called."""

    @abstractmethod
    def again(self, index: int, alone: bool = False) -> None:
        """Do a task again: as soon as it can be, or alone when the others are done."""

    @abstractmethod
    def see(self, workers: Sequence[str]) -> None:
        """Take note of the workers that may be given tasks now; called at the start and every second."""

    def keeps(self, index: int) -> bool:
        """Say whether the result stays on the worker that made it."""
        return False

    @abstractmethod
    def finished(self, index: int, future: "Future[Any]") -> None:
        """Take note that a task is done; what is kept is in the agenda's care from now on."""

    def kept(self) -> "dict[int, Future[Any]]":
        """Return the results that are on workers and still needed."""
        return {}

    def lost(self, index: int) -> list[int]:
        """Make a lost result again. Returns the tasks that cannot go on as they were called."""
        return []


class TaskQueue(Agenda):
    """One task for each item, in their order."""

    def __init__(self, task: Task, items: Sequence[tuple[object, ...]], workers: list[str] | None = None) -> None:
        super().__init__()
        self._task, self._items, self._workers = task, items, workers
        self._waiting, self._failed = iter(range(len(items))), deque[int]()

    def _next(self, under_way: int, window: int) -> int | None:
        if self._failed:
            return self._failed.popleft()
        return next(self._waiting, None) if under_way < window else None

    def call(self, index: int) -> Call:
        """Return the task with this item."""
        return Call(self._task, self._items[index], workers=self._workers)

    def again(self, index: int, alone: bool = False) -> None:
        """Next, or alone."""
        (self._alone if alone else self._failed).append(index)

    def see(self, workers: Sequence[str]) -> None:
        """Dask finds a place for each."""

    def finished(self, index: int, future: "Future[Any]") -> None:
        """Its result has been fetched."""
