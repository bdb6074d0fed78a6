"""The real driver and scheduler with a thousand workers whose tasks only wait, while workers leave and join.

Run: python -m tests.benchmarks.scale [--workers 1000] [--strips 4000]

The matrix that is pretended has 256 × 32 test points and 2048 training points a strip: 256 inner chunks a strip, so
4000 strips are 1,024,000 chunks. Scheduler and client are processes of their own, the workers share a few; CPU seconds
and memory are those of scheduler and client. Tables: cost of a task by number of tasks; efficiency with tasks that last
ten times the measured cost × workers, in quiet and while two workers a second leave and two others join.
tests/scaling/test_scale.py is this in small.
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dask
import psutil
from distributed import Client, Scheduler, Worker

from distinfluence.scaling.dispatch.executor import OnCluster

CHUNKS_PER_STRIP = 256
WORKER_PROCESSES = 4  # workers fetch from each other: in one process, their sockets would pass its limit of open files
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.scheduler.worker-ttl": None,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    # what 1000 workers that share one event loop would be busy with
    "distributed.admin.system-monitor.interval": "10m",
    "distributed.admin.tick.interval": "10s",
    "distributed.admin.tick.limit": "60s",
    "distributed.comm.timeouts.connect": "120s",
    "distributed.comm.timeouts.tcp": "120s",
}


async def pretend(seconds: float, index: int) -> int:
    """A strip that only takes its time."""
    await asyncio.sleep(seconds)
    return index


async def serve_scheduler(file: Path) -> None:
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler:
        file.write_text(scheduler.address)
        await scheduler.finished()


async def serve_workers(address: str, n: int, flag: Path) -> None:
    """n workers in this process; while `flag` exists, two of them leave and two join each second."""
    chance = random.Random(0)

    async def join() -> Worker:
        worker: Worker = await Worker(
            address, nthreads=1, memory_limit=0, dashboard=False, local_directory=str(flag.parent)
        )
        return worker

    workers = []
    for start in range(0, n, 50):
        workers += await asyncio.gather(*(join() for _ in range(min(50, n - start))))
    while True:
        await asyncio.sleep(1.0)
        if flag.exists():
            for _ in range(2):
                leaving = workers.pop(chance.randrange(len(workers)))
                await leaving.close(timeout=5, reason="left")
                workers.append(await join())


@dataclass
class Cost:
    """Of scheduler and client, in one run."""

    tasks: int
    wall: float
    scheduler_cpu: float
    client_cpu: float
    scheduler_mib: float
    client_mib: float

    @property
    def each(self) -> float:
        """CPU seconds of a task."""
        return (self.scheduler_cpu + self.client_cpu) / self.tasks


@contextmanager
def cluster(n: int, folder: Path) -> Iterator[tuple[Client, psutil.Process, Path]]:
    address, flag = folder / "address", folder / "churn"
    here = [sys.executable, "-m", "tests.benchmarks.scale"]
    processes = [subprocess.Popen([*here, "--serve-scheduler", str(address)], stderr=subprocess.DEVNULL)]
    try:
        while not (address.exists() and address.read_text()):
            time.sleep(0.1)
        at = address.read_text()
        for i in range(WORKER_PROCESSES):
            some = n * (i + 1) // WORKER_PROCESSES - n * i // WORKER_PROCESSES
            own_flag = flag if i == 0 else flag.with_name("none")  # those of one process come and go
            command = [*here, "--serve-workers", at, "--workers", str(some), "--flag", str(own_flag)]
            processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        with Client(at, timeout=120) as client:
            client.wait_for_workers(n, timeout=600)
            yield client, psutil.Process(processes[0].pid), flag
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def measure(client: Client, scheduler: psutil.Process, tasks: int, seconds: float) -> Cost:
    """Run `tasks` tasks through the executor; every one must come back once."""
    own = psutil.Process()
    before = [sum(process.cpu_times()[:2]) for process in (scheduler, own)]
    executor, start = OnCluster(client, slow_seconds=max(60.0, 4 * seconds)), time.perf_counter()
    found = [index for index, _ in executor.run(pretend, (seconds,), [(i,) for i in range(tasks)])]
    wall = time.perf_counter() - start
    assert sorted(found) == list(range(tasks))
    after = [sum(process.cpu_times()[:2]) for process in (scheduler, own)]
    memory = [process.memory_info().rss / 2**20 for process in (scheduler, own)]
    return Cost(tasks, wall, after[0] - before[0], after[1] - before[1], *memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--strips", type=int, default=4000)
    parser.add_argument("--serve-scheduler", type=Path)
    parser.add_argument("--serve-workers")
    parser.add_argument("--flag", type=Path)
    given = parser.parse_args()
    with dask.config.set(QUIET):
        if given.serve_scheduler:
            asyncio.run(serve_scheduler(given.serve_scheduler))
        elif given.serve_workers:
            asyncio.run(serve_workers(given.serve_workers, given.workers, given.flag))
        else:
            with tempfile.TemporaryDirectory() as folder:
                report(given.workers, given.strips, Path(folder))


def report(workers: int, strips: int, folder: Path) -> None:
    start = time.perf_counter()
    with cluster(workers, folder) as (client, scheduler, flag):
        print(f"{workers} workers after {time.perf_counter() - start:.0f} s, {os.cpu_count()} cores", flush=True)
        measure(client, scheduler, 100, 0.01)
        print("| tasks | chunks | wall s | scheduler CPU ms/task | client CPU ms/task | scheduler MiB | client MiB |")
        print("|---|---|---|---|---|---|---|")
        costs = []
        for tasks in sorted({100, 400, 1000, strips}):
            costs.append(cost := measure(client, scheduler, tasks, 0.01))
            print(
                f"| {tasks} | {tasks * CHUNKS_PER_STRIP} | {cost.wall:.1f} | {1e3 * cost.scheduler_cpu / tasks:.2f} | "
                f"{1e3 * cost.client_cpu / tasks:.2f} | {cost.scheduler_mib:.0f} | {cost.client_mib:.0f} |",
                flush=True,
            )
        each = [cost.each for cost in costs]
        grown = costs[-1].scheduler_mib + costs[-1].client_mib - costs[0].scheduler_mib - costs[0].client_mib
        print(
            f"scheduler and client: {1e3 * min(each):.2f} to {1e3 * max(each):.2f} CPU ms a task, "
            f"{grown:.0f} MiB more after {strips} tasks than after {costs[0].tasks}",
            flush=True,
        )
        seconds = 10 * each[-1] * workers
        for churn in (False, True):
            if churn:
                flag.touch()
            long = measure(client, scheduler, strips, seconds)
            ideal = -(-strips // workers) * seconds
            print(
                f"tasks of {seconds:.1f} s{' while workers leave and join' if churn else ''}: {long.wall:.0f} s, "
                f"ideal {ideal:.0f} s, efficiency {ideal / long.wall:.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
