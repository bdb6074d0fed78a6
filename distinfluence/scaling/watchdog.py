"""A watch over worker jobs: what ended is replaced, and what will never start becomes an error.

Dask-jobqueue submits jobs and cancels them, and does not look after them. A job that is killed, pre-empted or at its
time limit is not replaced, one that is requeued is cancelled in its new wait, a refusal of sbatch is a line in a log.
Here a thread compares the jobs with the queue every few seconds. Where there is no view of the queue (schedulers other
than SLURM) a job counts as ended when its worker came and has gone.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler, SchedulerPlugin

from distinfluence.scaling.slurm import NEVER, PASSING, RAN, THERE, QueuedJob, SlurmQueue

LOOK_SECONDS = 2.0  # between looks at the queue
GONE_SECONDS = 15.0  # that a worker may be away before its job counts as ended, without a view of the queue
STARTS_TRIED = 3  # jobs in a row that end before their worker arrives
PAUSE_SECONDS = 60.0  # before submitting again where jobs were refused or failed while others work
PASSING_SECONDS = 120.0  # that a refusal which may pass is waited for


class Arrivals(SchedulerPlugin):
    """The names of all workers that ever came."""

    name = "distinfluence-arrivals"

    def __init__(self) -> None:
        self.names: set[str] = set()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Note it."""
        self.names.add(str(scheduler.workers[worker].name))


@dataclass(frozen=True)
class Jobs:
    """The jobs at one moment. numbers: job name → its number at the queue, None if it was refused."""

    numbers: Mapping[str, str | None]
    connected: frozenset[str]


@dataclass
class Watchdog:
    """Keeps `workers` jobs of a dask-jobqueue cluster in the queue or running.

    cluster: its scheduler must run in this process. queue: None for a scheduler whose queue is not looked at. workers:
    None if Dask's adaptive scaling says how many. refusals: filled by the cluster's jobs when they cannot be submitted.
    announce: told what people should know. on_failure: called once, when `failure` has been set.
    """

    cluster: Any
    queue: SlurmQueue | None
    workers: int | None
    refusals: list[str]
    announce: Callable[[str], None]
    on_failure: Callable[[], None] = lambda: None
    failure: str | None = None
    replaced: int = 0
    last_said: str = ""
    submitted: set[str] = field(default_factory=set)
    _arrivals: Arrivals = field(default_factory=Arrivals)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _ran: set[str] = field(default_factory=set)
    _missed: Counter[str] = field(default_factory=Counter)
    _away: dict[str, float] = field(default_factory=dict)
    _failed_starts: int = 0
    _not_before: float = 0.0
    _refused_since: float | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Submit the first jobs and begin to watch."""
        self.cluster.scheduler.add_plugin(self._arrivals)
        self._act([])
        self._thread = threading.Thread(target=self._watch, name="distinfluence-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch; jobs stay as they are."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def has_workers(self) -> bool:
        """Whether one is connected now."""
        return bool(self.cluster.scheduler.workers)

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS) and self.failure is None:
            try:
                self._look()
            except Exception as error:  # a watch that ends silently would leave the run waiting for ever
                if not self._stop.is_set():
                    self.announce(f"watching the jobs failed, trying again: {type(error).__name__}: {error}")
        if self.failure is not None:
            self.on_failure()

    def _look(self) -> None:
        before: Jobs = self.cluster.sync(self._jobs)
        listed = self.queue.look() if self.queue is not None else {}
        jobs: Jobs = self.cluster.sync(self._jobs)  # workers that came in the meantime
        submitted = any(number is not None for number in before.numbers.values())
        if self._stop.is_set() or (listed is None and submitted):
            return  # nothing is concluded from no answer; that no job could be submitted is known without one
        listed = listed or {}
        jobs = Jobs(before.numbers, jobs.connected)
        ended = self._ended_by_queue(jobs, listed) if self.queue is not None else self._ended_by_workers(jobs)
        refused = [name for name, number in jobs.numbers.items() if number is None]
        self._judge_starts(jobs, ended)
        self._judge_refusals(jobs, ended, refused)
        if self.queue is not None:
            self._judge_waiting(jobs, listed, ended)
        if self.failure is None:
            self._act([*ended, *refused])

    def _ended_by_queue(self, jobs: Jobs, listed: Mapping[str, QueuedJob]) -> list[str]:
        ended = []
        for name, number in jobs.numbers.items():
            if number is None:
                continue
            job = listed.get(number)
            # a job that was only just submitted may not be listed yet
            self._missed[number] = self._missed[number] + 1 if job is None else 0
            back_in_queue = job is not None and job.state not in RAN and (number in self._ran or self._came(name))
            if job is not None and job.state in RAN:
                self._ran.add(number)
            if self._missed[number] > 1 or (job is not None and job.state not in THERE) or back_in_queue:
                ended.append(name)
        return ended

    def _ended_by_workers(self, jobs: Jobs) -> list[str]:
        now = time.monotonic()
        for name in jobs.numbers:
            if self._came(name) and not any(_of_job(worker, name) for worker in jobs.connected):
                self._away.setdefault(name, now)
            else:
                self._away.pop(name, None)
        return [name for name in jobs.numbers if now - self._away.get(name, now) > GONE_SECONDS]

    def _came(self, name: str) -> bool:
        return any(_of_job(worker, name) for worker in self._arrivals.names)

    def _judge_starts(self, jobs: Jobs, ended: list[str]) -> None:
        """Jobs that end before their worker arrives will do so again: give up, or try more slowly if others work."""
        if any(self._came(name) for name in jobs.numbers if name not in ended):
            self._failed_starts = 0
        failed = [name for name in ended if not self._came(name)]
        self._failed_starts += len(failed)
        if not failed or self._failed_starts < STARTS_TRIED:
            return
        numbers = [str(jobs.numbers[name]) for name in failed]
        why = self.queue.explain(numbers[-1]) if self.queue is not None else f"job {numbers[-1]}"
        if jobs.connected:
            self._not_before = time.monotonic() + PAUSE_SECONDS
            self.announce(f"worker jobs end before their worker starts; going on with those that run: {why}")
            return
        self.failure = (
            f"{self._failed_starts} worker jobs in a row ended before their worker had started. Correct what the log "
            f"names (`python`, `job_script_prologue`, `memory` of the cluster); {why}"
        )

    def _judge_refusals(self, jobs: Jobs, ended: list[str], refused: list[str]) -> None:
        """A refusal ends the run if no job of it is there; otherwise it goes on with those that are."""
        if not refused:
            self._refused_since = None
            return
        now, text = time.monotonic(), self.refusals[-1] if self.refusals else "no reason given"
        self._refused_since = self._refused_since or now
        there = any(number is not None for name, number in jobs.numbers.items() if name not in ended)
        passing = PASSING.search(text) is not None and now - self._refused_since < PASSING_SECONDS
        if not there and not passing:
            self.failure = f"the queue refuses worker jobs. Correct the cluster's settings; it says: {text}"
            return
        self._not_before = now + (LOOK_SECONDS if not there else PAUSE_SECONDS)
        self._tell(f"the queue refuses {len(refused)} worker jobs for now, trying again: {text}")

    def _judge_waiting(self, jobs: Jobs, listed: Mapping[str, QueuedJob], ended: list[str]) -> None:
        """Say what the queue is doing while no worker is there; a wait without end is a failure."""
        waited = (number for name, number in jobs.numbers.items() if name not in ended)
        mine = [listed[number] for number in waited if number is not None and number in listed]
        if jobs.connected or not mine:
            return
        if all(job.state == "PENDING" and job.reason in NEVER for job in mine):
            self.failure = (
                f"the {len(mine)} worker jobs will never start: SLURM gives the reason {mine[0].reason}. Correct the "
                "cluster's settings."
            )
            return
        waiting = Counter(job.reason for job in mine if job.state == "PENDING")
        words = [f"{n} pending ({reason})" for reason, n in waiting.most_common()]
        starting = len(mine) - sum(waiting.values())
        words += [f"{starting} starting"] if starting else []
        starts = sorted(job.starts for job in mine if job.state == "PENDING" and job.starts[:1].isdigit())
        words += [f"the first expected at {starts[0]}"] if starts else []
        self._tell(f"waiting for workers, {len(mine)} jobs: {', '.join(words)}")

    def _tell(self, text: str) -> None:
        if text != self.last_said:
            self.last_said = text
            self.announce(text)

    def _act(self, gone: list[str]) -> None:
        """Drop what has gone and fill up, if it is time to."""
        self.cluster.sync(self._correct, gone)
        jobs: Jobs = self.cluster.sync(self._jobs)
        self.submitted.update(number for number in jobs.numbers.values() if number is not None)

    async def _jobs(self) -> Jobs:
        numbers = {name: getattr(job, "job_id", None) for name, job in self.cluster.workers.items()}
        return Jobs(numbers, frozenset(str(worker.name) for worker in self.cluster.scheduler.workers.values()))

    async def _correct(self, gone: list[str]) -> None:
        cluster = self.cluster
        for name in gone:
            self.replaced += 1
            cluster.worker_spec.pop(name, None)
            for worker in list(cluster.scheduler.workers.values()):
                if _of_job(str(worker.name), name):  # its host may have gone without a word; not the tasks' fault
                    await cluster.scheduler.remove_worker(worker.address, stimulus_id="job-ended", expected=True)
        if self.workers is not None and time.monotonic() >= self._not_before:
            while len(cluster.worker_spec) < self.workers:
                # never a name twice: what is left of the first job of that name would be in the way
                cluster.worker_spec[f"{cluster.name}-{next(self._numbers)}"] = cluster.new_spec
        await cluster._correct_state()


def _of_job(worker: str, job: str) -> bool:
    """With several processes in a job, each worker is named for it with a number."""
    return worker == job or worker.startswith(f"{job}-")
