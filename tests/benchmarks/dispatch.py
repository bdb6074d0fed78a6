"""The dispatcher next to what Dask has for the same: `retries`, `worker-ttl` and `worker-saturation`.

Run: python -m tests.benchmarks.dispatch

Tasks that only wait, on three workers. One worker is killed, or stops responding for as long as the run lasts. Each row
says how long all tasks took and how often tasks were run in all; the first line says the least that is possible.
"""

import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, as_completed

from distinfluence.scaling.dispatch.executor import OnCluster

TASKS, SECONDS, WORKERS = 60, 0.25, 3
LIMIT = 90.0
Way = Callable[[Client, Sequence[tuple[Any, ...]]], Iterator[Any]]


def wait(index: int, folder: str, seconds: float) -> int:
    """Leave a file for each run of the task, then wait."""
    Path(folder, f"{index}-{uuid.uuid4().hex}").touch()
    time.sleep(seconds)
    return index


def dispatcher(client: Client, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Ours, which calls a task slow that takes four times as long as usual and two seconds."""
    yield from OnCluster(client, slow_seconds=2.0).run(wait, (), items)


def plain(client: Client, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Dask's: all tasks at once, each with two retries; a worker that is silent for ten seconds is given up."""
    futures = [client.submit(wait, *item, retries=2, pure=False) for item in items]
    yield from as_completed(futures, with_results=True)


def killed(pid: int) -> None:
    """Kill a worker for good."""
    os.kill(pid, signal.SIGKILL)


def stopped(pid: int) -> None:
    """Let a worker stop responding: its process is there and does nothing."""
    os.kill(pid, signal.SIGSTOP)


def nothing(pid: int) -> None:
    """Leave the workers alone."""


def measure(way: Way, harm: Callable[[int], None]) -> tuple[float | None, int]:
    """Seconds until all tasks are done, None if that is not in time; and how many runs there were."""
    settings = {"distributed.scheduler.worker-ttl": "10 s", "distributed.scheduler.worker-saturation": 1.1}
    with tempfile.TemporaryDirectory() as folder, dask.config.set(settings):
        cluster = LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None, silence_logs=50)
        client = Client(cluster)
        try:
            items = [(i, folder, SECONDS) for i in range(TASKS)]
            pid = next(iter(client.run(os.getpid).values()))
            timer = threading.Timer(1.5, harm, [pid])
            timer.start()
            start = time.monotonic()
            pool = ThreadPoolExecutor(1)
            done = pool.submit(lambda: len(list(way(client, items))))
            try:
                assert done.result(LIMIT) == TASKS
                seconds: float | None = time.monotonic() - start
            except NotInTime:
                seconds = None
            finally:
                with suppress(ProcessLookupError):  # its nanny may have killed it
                    os.kill(pid, signal.SIGCONT)
            done.result(LIMIT)
            return seconds, len(os.listdir(folder))
        finally:
            client.close()
            cluster.close()


def main() -> None:
    """Print one line for each harm and way."""
    least = TASKS * SECONDS / WORKERS
    print(f"{TASKS} tasks of {SECONDS} s on {WORKERS} workers: {least:.1f} s at least\n")
    print(f"{'what happens':<42}{'way':<14}{'seconds':>9}{'runs':>7}")
    cases: list[tuple[str, Callable[[int], None]]] = [
        ("nothing", nothing),
        ("a worker is killed and comes back", killed),
        ("a worker stops responding", stopped),
    ]
    for name, harm in cases:
        for label, way in (("dispatcher", dispatcher), ("Dask alone", plain)):
            seconds, runs = measure(way, harm)
            shown = f"{seconds:.1f}" if seconds is not None else f"> {LIMIT:.0f}"
            print(f"{name:<42}{label:<14}{shown:>9}{runs:>7}", flush=True)


if __name__ == "__main__":
    main()
