"""What the tests of failures share: workers that come back at once, who kills them, and what was made twice.

DISTINFLUENCE_CHAOS says how many processes each test kills, and the seed of their choice and moments, as 20:20261128.
Without it there are five kills with seed 0. `make soak` sets twenty and the date. A test that fails shows the value.
"""

import json
import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
from distributed import Client

from distinfluence.scaling import ClusterSpec, Progress, connected
from distinfluence.scaling.progress import Bar

KILLS, SEED = (int(part) for part in os.environ.get("DISTINFLUENCE_CHAOS", "5:0").split(":"))
DEADLINE = 120.0  # Seconds within which anything must have happened, also on a busy machine.


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def marks(path: Path) -> dict[str, int]:
    """Strip → when its mark was written."""
    files = [file for file in (path / "strip_status" / "c").glob("*") if file.suffix != ".partial"]
    return {file.name: file.stat().st_mtime_ns for file in files}


def forked() -> list[psutil.Process]:
    """The living processes that were forked for workers; see `tests.forking`."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    try:
        return [p for p in psutil.Process(pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    except (psutil.NoSuchProcess, TypeError):
        return []


@contextmanager
def quick_workers(n: int = 2) -> Iterator[Client]:
    """A local cluster whose workers come back at once and are never blamed; none of its processes may be left."""
    before = {process.pid for process in forked()}
    with connected(ClusterSpec(workers=n)) as client:

        def patient(dask_scheduler: Any) -> None:
            dask_scheduler.allowed_failures = 1000

        client.run_on_scheduler(patient)
        yield client
    wait_for(lambda: {process.pid for process in forked()} <= before)


class Staged(Progress):
    """Silent progress that knows which stage is `now`; file: where it writes that down."""

    def __init__(self, file: Path | None = None) -> None:
        super().__init__(False)
        self.now, self._noted = "", file

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Bar]:
        self.now = name
        if self._noted is not None:
            self._noted.write_text(name)
        with super().stage(name, total, unit) as bar:
            yield bar
        self.now = ""


class Killer:
    """Kills random workers of a local cluster while a run is in certain stages. seed: of choice and moments."""

    def __init__(self, client: Client, progress: Staged, stages: set[str], kills: int, seed: int) -> None:
        self.client, self.progress, self.stages, self.most = client, progress, stages, kills
        self.random, self.kills = random.Random(seed), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._strike, daemon=True)

    def _strike(self) -> None:
        while self.kills < self.most and not self._stop.wait(self.random.uniform(0.1, 0.5)):
            own = {nanny.pid for nanny in list(self.client.cluster.workers.values())}
            now = time.time()
            grown = sorted(p.pid for p in forked() if p.pid in own and now - p.create_time() > 0.5)
            if grown and self.progress.now in self.stages:
                os.kill(self.random.choice(grown), signal.SIGKILL)
                self.kills += 1

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE)


def logged(folder: Path) -> list[dict[str, Any]]:
    """What workers wrote down; of a line that a death cut short, nothing."""
    lines = []
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return lines


def made(folder: Path, begun: str, done: str) -> tuple[set[int], set[int]]:
    """Chunks that were finished, and those of them whose making began again after that."""
    lines = [line for line in logged(folder) if line["level"] == "INFO"]
    ended: dict[int, float] = {}
    for line in lines:
        if line["message"] == done:
            ended[line["chunk"]] = min(line["time"], ended.get(line["chunk"], line["time"]))
    starts = defaultdict(list)
    for line in lines:
        if line["message"] == begun:
            starts[line["chunk"]].append(line["time"] - line["seconds"])
    again = {chunk for chunk, at in ended.items() if any(start > at + 0.01 for start in starts[chunk])}
    return set(ended), again
