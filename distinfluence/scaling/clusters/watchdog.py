"""A watch over worker jobs: what ended is replaced, and what will never start becomes an error.

Dask-jobqueue submits jobs and cancels them, and does not look after them. A job that is killed, pre-empted or at its
time limit is not replaced, one that is requeued is cancelled in its new wait, a refusal of sbatch is a line in a log.
Here a thread compares the jobs with the queue: every few seconds while anything changes, and at once when a worker
comes or goes. Where there is no view of the queue (schedulers other than SLURM) a job counts as ended when its worker
came and has gone.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dask.utils import format_time
from distributed import Scheduler, SchedulerPlugin

from distinfluence.scaling.clusters.slurm import NEVER, PASSING, RAN, THERE, QueuedJob
from distinfluence.scaling.clusters.walltime import LongTasks

LOOK_SECONDS, QUIET_SECONDS, SLOWER = 2.0, 10.0, 1.5  # to the next look; at most, when nothing changes; and how fast
SETTLE_SECONDS = 0.3  # workers that come or go together are looked at together
GONE_SECONDS = 15.0  # that a worker may be away before its job counts as ended, without a view of the queue
STARTS_TRIED = 3  # jobs in a row that end before their worker arrives
PAUSE_SECONDS = 60.0  # before submitting again where jobs were refused or failed while others work
PASSING_SECONDS = 120.0  # that a refusal which may pass is waited for
SILENT_SECONDS = 30.0  # after which a wait that nobody can look into is spoken of; then after twice as long, and so on


class BatchQueue(Protocol):
    """What the watch asks of a queue."""

    def look(self, numbers: Iterable[str]) -> Mapping[str, QueuedJob] | None:
        """Return the jobs of these numbers; None if there is no answer."""

    def explain(self, number: str) -> str:
        """Say how a job ended."""


class Arrivals(SchedulerPlugin):
    """Names of the jobs whose workers came, as far as they are not forgotten.

    A worker has the name of its job. With several processes in a job, its name begins with the job's.
    Either may be the name of the job.

    Args:
        changed: Set when a worker comes or goes.
    """

    name = "distinfluence-arrivals"

    def __init__(self, changed: threading.Event) -> None:
        self.names: set[str] = set()
        self.count = 0
        self._changed = changed

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Note it."""
        self.names.update(_possible_jobs(str(scheduler.workers[worker].name)))
        self.count += 1
        self._changed.set()

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: object) -> None:
        """Have the queue looked at."""
        self._changed.set()


@dataclass(frozen=True)
class Jobs:
    """The jobs at one moment.

    Attributes:
        numbers: Job name → its number at the queue; None if it was refused.
        connected: Names of the jobs whose workers are connected.
    """

    numbers: Mapping[str, str | None]
    connected: frozenset[str]


@dataclass
class Watchdog:
    """Keeps `workers` jobs of a dask-jobqueue cluster in the queue or running.

    Attributes:
        cluster: The cluster; its scheduler must run in this process.
        queue: The queue; None for a scheduler whose queue is not looked at.
        workers: How many jobs to keep; None if Dask's adaptive scaling says how many.
        refusals: Filled by the cluster's jobs when they cannot be submitted.
        announce: Called with a text that people should read.
        worker_seconds: Seconds that a worker has; None without end.
        on_failure: Called once, when `failure` has been set.
        failure: Why the run must end; None while it need not.
    """

    cluster: Any
    queue: BatchQueue | None
    workers: int | None
    refusals: list[str]
    announce: Callable[[str], None]
    worker_seconds: float | None = None
    on_failure: Callable[[], None] = lambda: None
    failure: str | None = None
    replaced: int = 0
    last_said: str = ""
    _changed: threading.Event = field(default_factory=threading.Event)
    _arrivals: Arrivals = field(init=False)
    _arrived: int = 0
    _ran: set[str] = field(default_factory=set)
    _missed: Counter[str] = field(default_factory=Counter)
    _away: dict[str, float] = field(default_factory=dict)
    _failed_starts: int = 0
    _failed_alone: int = 0
    _not_before: float = 0.0
    _refused_since: float | None = None
    _silent_since: float | None = None
    _silent_for: float = 0.0
    _long: LongTasks | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._arrivals = Arrivals(self._changed)

    def start(self) -> None:
        """Submit the first jobs and begin to watch."""
        self.cluster.scheduler.add_plugin(self._arrivals)
        self._long = None if self.worker_seconds is None else LongTasks(self.worker_seconds)
        self.cluster.sync(self._correct, [])
        self._thread = threading.Thread(target=self._watch, name="distinfluence-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch; jobs stay as they are."""
        self._stop.set()
        self._changed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def has_workers(self) -> bool:
        """Say whether one is connected now."""
        return bool(self.cluster.scheduler.workers)

    def may_submit(self) -> bool:
        """Say whether it is time to, after jobs were refused or failed."""
        return time.monotonic() >= self._not_before

    def _watch(self) -> None:
        seconds, seen = LOOK_SECONDS, object()
        while self.failure is None:
            self._changed.wait(seconds)
            if self._stop.wait(SETTLE_SECONDS):
                return
            self._changed.clear()
            before = seen
            try:
                seen = self._look()
            except Exception as error:  # a watch that ends silently would leave the run waiting for ever
                if not self._stop.is_set():
                    self.announce(f"watching the jobs failed, trying again: {type(error).__name__}: {error}")
            quiet = seen == before and not self._away
            seconds = min(QUIET_SECONDS, seconds * SLOWER) if quiet else LOOK_SECONDS
        self.on_failure()

    def _look(self) -> object:
        """Look at the queue and the workers once and act on it; equal to what the last look gave if nothing changed."""
        before: Jobs = self.cluster.sync(self._jobs)
        numbers = [number for number in before.numbers.values() if number is not None]
        listed = self.queue.look(numbers) if self.queue is not None else {}
        after: Jobs = self.cluster.sync(self._jobs)
        if self._stop.is_set() or (listed is None and numbers):
            return None  # nothing is concluded from no answer; that no job could be submitted is known without one
        listed = listed or {}
        # jobs that adaptive scaling has given up meanwhile have not failed; workers may have come
        jobs = Jobs({n: number for n, number in before.numbers.items() if n in after.numbers}, after.connected)
        ended = self._ended_by_queue(jobs, listed) if self.queue is not None else self._ended_by_workers(jobs)
        refused = [name for name, number in jobs.numbers.items() if number is None]
        self._judge_starts(jobs, ended, listed)
        self._judge_refusals(jobs, ended, refused)
        if self.queue is not None:
            self._judge_waiting(jobs, listed, ended)
        else:
            self._judge_silence(jobs)
        self._judge_tasks()
        if self.failure is None:
            self.cluster.sync(self._correct, [*ended, *refused])
        return jobs, {number: (job.state, job.reason) for number, job in listed.items()}, ended

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
        return name in self._arrivals.names

    def _judge_starts(self, jobs: Jobs, ended: list[str], listed: Mapping[str, QueuedJob]) -> None:
        """Jobs that end before their worker arrives will do so again: give up, or try more slowly if others work.

        One bad node that takes every job at once gives a failure or two at each look, so they are added up until a
        worker arrives anew; that some have been there all along says nothing of it.
        """
        if self._arrivals.count > self._arrived:
            self._failed_starts = self._failed_alone = 0
            self._arrived = self._arrivals.count
        failed = [name for name in ended if not self._came(name)]
        self._failed_starts += len(failed)
        self._failed_alone = 0 if jobs.connected else self._failed_alone + len(failed)
        if not failed or self._failed_starts < STARTS_TRIED:
            return
        starting = [n for name, n in jobs.numbers.items() if name not in ended and n in listed and not self._came(name)]
        patience = len(jobs.numbers) if any(listed[str(n)].state in RAN for n in starting) else 0
        if not jobs.connected and self._failed_alone < STARTS_TRIED + patience:
            return  # those that have started may do better
        numbers = [str(jobs.numbers[name]) for name in failed]
        why = self.queue.explain(numbers[-1]) if self.queue is not None else f"job {numbers[-1]}"
        if jobs.connected:
            self._not_before = time.monotonic() + PAUSE_SECONDS
            self.announce(
                f"{self._failed_starts} worker jobs in a row ended before their worker had started; going on with "
                f"those that run, and trying again in {PAUSE_SECONDS:.0f} s: {why}"
            )
            return
        self.failure = (
            f"{self._failed_alone} worker jobs in a row ended before their worker had started. Correct what the log "
            f"names (`python`, `job_script_prologue`, `memory` of the cluster); {why}"
        )

    def _judge_refusals(self, jobs: Jobs, ended: list[str], refused: list[str]) -> None:
        """End the run after a refusal if none of its jobs is there; otherwise go on with those that are."""
        if any(number is not None for number in jobs.numbers.values()):
            self._refused_since = None  # not as soon as nothing is refused: between two tries nothing is
        if not refused:
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
        if all(job.state == "PENDING" and NEVER.fullmatch(job.reason) for job in mine):
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

    def _judge_silence(self, jobs: Jobs) -> None:
        """Without a view of the queue, a job that fails as it starts looks like one that waits: say how long it is."""
        now, there = time.monotonic(), [number for number in jobs.numbers.values() if number is not None]
        if jobs.connected or not there:
            self._silent_since = None
            return
        if self._silent_since is None:
            self._silent_since, self._silent_for = now, SILENT_SECONDS
        if now - self._silent_since >= self._silent_for:
            self._silent_for = 2 * (now - self._silent_since)
            self._tell(
                f"waiting for workers, {len(there)} jobs submitted, none has come for "
                f"{format_time(now - self._silent_since)}. If the queue has started or ended them, their logs say "
                "why; `timeout` of the cluster ends the wait."
            )

    def _judge_tasks(self) -> None:
        """Tasks that workers cannot end in the time they have would be begun again and again, without an error."""
        if self._long is None:
            return
        executing, unfinished = self.cluster.sync(self._tasks)
        now = time.monotonic()
        self.failure = self.failure or self._long.look(now, executing, unfinished)
        warning = self._long.warning(now)
        if warning is not None:
            self.announce(warning)

    def _tell(self, text: str) -> None:
        if text != self.last_said:
            self.last_said = text
            self.announce(text)

    async def _jobs(self) -> Jobs:
        # what is no longer in worker_spec is being given up at this moment, and no job to judge
        there = {name: job for name, job in self.cluster.workers.items() if name in self.cluster.worker_spec}
        numbers = {name: getattr(job, "job_id", None) for name, job in there.items()}
        return Jobs(numbers, frozenset(str(worker.name) for worker in self.cluster.scheduler.workers.values()))

    async def _tasks(self) -> tuple[Mapping[str, frozenset[str]], frozenset[str]]:
        scheduler = self.cluster.scheduler
        executing = {
            address: frozenset(str(task.key) for task in worker.executing)
            for address, worker in scheduler.workers.items()
        }
        over = ("memory", "erred", "forgotten")
        return executing, frozenset(str(key) for key, task in scheduler.tasks.items() if task.state not in over)

    async def _correct(self, gone: list[str]) -> None:
        """Drop what has gone and fill up, if it is time to."""
        cluster = self.cluster
        for name in gone:
            self.replaced += 1
            cluster.worker_spec.pop(name, None)
            for worker in list(cluster.scheduler.workers.values()):
                if _of_job(str(worker.name), name):  # its host may have gone without a word; not the tasks' fault
                    await cluster.scheduler.remove_worker(worker.address, stimulus_id="job-ended", expected=True)
        if self.workers is not None and self.may_submit():
            while len(cluster.worker_spec) < self.workers:
                cluster.worker_spec.update(cluster.new_worker_spec())
        self._arrivals.names &= set(cluster.worker_spec)
        await cluster._correct_state()


def _of_job(worker: str, job: str) -> bool:
    return job in _possible_jobs(worker)


def _possible_jobs(worker: str) -> tuple[str, str]:
    """With several processes in a job, each worker is named for it with a number."""
    return worker, worker.rpartition("-")[0]
