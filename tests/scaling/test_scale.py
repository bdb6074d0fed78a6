"""A small `tests.benchmarks.scale`: driver and scheduler with fifty workers that leave and join, a thousand tasks."""

from collections import Counter
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster

from distinfluence.scaling.dispatch.dispatcher import TASKS_PER_THREAD, Dispatcher
from distinfluence.scaling.dispatch.executor import OnCluster
from tests.benchmarks.scale import QUIET, pretend

WORKERS, TASKS = 50, 1000
# A result whose holder has just left is asked for once more after this long.
SETTINGS = {**QUIET, "distributed.comm.timeouts.connect": "5s"}


def test_a_thousand_tasks_on_fifty_workers_that_leave_and_join_are_done_once_with_few_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_flight: list[int] = []
    submit = Dispatcher._submit

    def counting(self: Dispatcher, *arguments: Any) -> None:
        submit(self, *arguments)
        in_flight.append(len(self.under_way))

    monkeypatch.setattr(Dispatcher, "_submit", counting)
    options = {"threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with (
        dask.config.set(SETTINGS),
        LocalCluster(n_workers=WORKERS, memory_limit=0, **options) as cluster,
        Client(cluster) as client,
    ):
        there, seen = set(client.nthreads()), set[str]()
        executor, found = OnCluster(client, slow_seconds=120.0), Counter[int]()
        for index, result in executor.run(pretend, (0.005,), [(i,) for i in range(TASKS)]):
            assert index == result
            found[index] += 1
            if found.total() % 200 == 100:  # ten leave, or ten others join
                cluster.scale(WORKERS - 10 if found.total() % 400 == 100 else WORKERS)
                seen |= set(client.nthreads())
        seen |= set(client.nthreads())
    assert found == Counter(range(TASKS))
    assert executor.events == {"submitted": TASKS}
    assert max(in_flight) <= TASKS_PER_THREAD * WORKERS
    assert seen - there  # new ones came
