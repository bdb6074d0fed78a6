"""The tree of a sum over chunks: a task for each group of chunks and for each addition, few of them at a time.

A worker takes a run of neighbouring groups, in their order, the same as in the pass before: it has their chunks, and
most additions are between its own sums. Who has nothing left takes from whoever has most. FAN_IN sums are added as soon
as they are there, before further groups are begun, so that a worker holds few: at most what `groups.results_held` says.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from distributed import Future

from distinfluence.scaling.dispatch.agenda import Agenda, Call
from distinfluence.scaling.dispatch.kernel_tasks import add_parts, run_kernel
from distinfluence.scaling.plan.tree_shape import FAN_IN, PER_WORKER, homes


class Tree(Agenda):
    """The groups of a sum and their additions. `total` is the number of the last one, whose result is fetched.

    arguments: of the task of each group, after what all share. before: group → the worker that had it in the last pass.
    sizes: samples of each group. told: called with the samples that are done, whenever a group is.
    """

    def __init__(
        self,
        arguments: Sequence[tuple[object, ...]],
        before: dict[int, str],
        sizes: Sequence[int] = (),
        told: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self._sizes, self._told = dict(enumerate(sizes)), told
        self._done = 0
        self._arguments = arguments
        self.homes = dict(before)
        self._inputs: dict[int, list[int]] = {}
        self._above: dict[int, int] = {}
        level = list(range(len(arguments)))
        while len(level) > 1:
            level = [self._added(level[i : i + FAN_IN]) for i in range(0, len(level), FAN_IN)]
        self.total = level[0]
        self._to_do: set[int] = set(range(len(arguments)))  # groups that are not under way and not done
        self._at: dict[int, str] = {}
        self._ready: list[int] = []  # additions whose inputs are there
        self._made: dict[int, Future[Any]] = {}
        self._queues: dict[str, deque[int]] = {}

    def _added(self, inputs: list[int]) -> int:
        if len(inputs) == 1:
            return inputs[0]
        number = len(self._arguments) + len(self._inputs)
        self._inputs[number] = inputs
        self._above |= dict.fromkeys(inputs, number)
        return number

    def see(self, workers: Sequence[str]) -> None:
        """Deal the groups that are still to be begun anew, if the workers are others."""
        if set(workers) == set(self._queues):
            return
        if workers:
            self.homes = homes(len(self._arguments), self.homes, workers)
        self._queues = {worker: deque() for worker in workers}
        if workers:
            for group in sorted(self._to_do):
                self._queues[self.homes[group]].append(group)

    def _next(self, under_way: int, window: int) -> int | None:
        if self._ready:
            return self._ready.pop()
        if not self._to_do:
            return None
        if not self._queues:  # no worker now: have something there for the first that comes
            return self._begin(min(self._to_do), "") if under_way < PER_WORKER else None
        busy = Counter(self._at.values())
        for worker in sorted(self._queues, key=lambda worker: busy[worker]):
            if busy[worker] >= PER_WORKER:
                return None
            if self._queues[worker]:
                return self._begin(self._queues[worker].popleft(), worker)
            most = max(self._queues.values(), key=len)
            if most and (not busy[worker] or len(most) > PER_WORKER):
                return self._begin(most.pop(), worker)
        return None

    def _begin(self, group: int, worker: str) -> int:
        self._to_do.remove(group)
        self._at[group] = worker
        if worker:
            self.homes[group] = worker
        return group

    def call(self, index: int) -> Call:
        """Return the sum of a group where its chunks are, or an addition where most of its inputs are."""
        if index < len(self._arguments):
            worker = self._at.get(index)
            return Call(run_kernel, self._arguments[index], workers=[worker] if worker else None)
        inputs = tuple(self._made[i] for i in self._inputs[index])
        return Call(add_parts, inputs, with_shared=False, priority=1)

    def keeps(self, index: int) -> bool:
        """All but the total."""
        return index != self.total

    def finished(self, index: int, future: "Future[Any]") -> None:
        """Hold the result until it is added; let go of those that it was made of."""
        self._at.pop(index, None)
        if self._told is not None and index in self._sizes:
            self._done += self._sizes.pop(index)  # a group that is made again was counted
            self._told(self._done)
        for i in self._inputs.get(index, ()):
            self._made.pop(i).release()
        if self.keeps(index):
            self._made[index] = future
            self._ready_if_complete(self._above[index])

    def _ready_if_complete(self, index: int) -> None:
        if all(i in self._made for i in self._inputs[index]) and index not in self._ready:
            self._ready.append(index)

    def kept(self) -> "dict[int, Future[Any]]":
        """Return sums that wait to be added."""
        return dict(self._made)

    def again(self, index: int, alone: bool = False) -> None:
        """Do groups again at once, and an addition when its inputs are there; failed ones are made again, too."""
        if index >= len(self._arguments):
            for i in self._inputs[index]:
                if i in self._made and self._made[i].status in ("error", "cancelled"):
                    self._made.pop(i).release()
                if i not in self._made:
                    self.again(i, alone)
            self._ready_if_complete(index)
            return
        self._at.pop(index, None)
        if alone:
            self._alone.append(index)
            return
        self._to_do.add(index)
        if self._queues:
            home = self.homes[index] if self.homes[index] in self._queues else next(iter(self._queues))
            self._queues[home].appendleft(index)

    def lost(self, index: int) -> list[int]:
        """Make it again, from the chunks if need be; the addition that waits for it has to wait on."""
        self._made.pop(index).release()
        above = self._above[index]
        if above in self._ready:
            self._ready.remove(above)
        self.again(index)
        return [above]
