"""What the watch over worker jobs concludes from what it sees, without a queue, workers or a wait."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from distinfluence.scaling.clusters import watchdog
from distinfluence.scaling.clusters.slurm import NEVER, QueuedJob
from distinfluence.scaling.clusters.walltime import LongTasks, lifetime_arguments, worker_seconds
from distinfluence.scaling.clusters.watchdog import PAUSE_SECONDS, Watchdog


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Site:
    """A queue with dask-jobqueue's cluster before it: what the watch sees, and what its acts lead to."""

    states: dict[str, QueuedJob] = field(default_factory=dict)
    answers: bool = True
    refusing: str = ""
    refusals: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    workers: dict[str, Any] = field(default_factory=dict)
    worker_spec: dict[str, Any] = field(default_factory=dict)
    new_state: QueuedJob = field(default_factory=lambda: QueuedJob("PENDING", "Priority", "N/A"))
    on_look: Callable[[], None] = lambda: None
    submitted: int = 0
    scheduler: Any = field(default_factory=lambda: SimpleNamespace(workers={}, tasks={}))

    def __post_init__(self) -> None:
        self.scheduler.remove_worker = self._remove_worker

    async def _remove_worker(self, address: str, **_: object) -> None:
        del self.scheduler.workers[address]

    def sync(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return asyncio.run(call(*arguments))

    def new_worker_spec(self) -> dict[str, Any]:
        self.submitted += 1
        return {f"job-{self.submitted}": {}}

    async def _correct_state(self) -> None:
        for name in set(self.workers) - set(self.worker_spec):
            job = self.workers.pop(name)
            if job.job_id in self.states:
                self.states[job.job_id] = QueuedJob("CANCELLED", "None", "N/A")
        for name in sorted(set(self.worker_spec) - set(self.workers)):
            number = None if self.refusing else name.replace("job-", "")
            self.workers[name] = SimpleNamespace(job_id=number)
            if number is None:
                self.refusals.append(self.refusing)
            else:
                self.states[number] = self.new_state

    def look(self, numbers: Iterable[str]) -> Mapping[str, QueuedJob] | None:
        self.on_look()
        return {n: self.states[n] for n in numbers if n in self.states} if self.answers else None

    def explain(self, number: str) -> str:
        return f"job {number} ended"

    def put(self, state: str, *numbers: str, reason: str = "None") -> None:
        for number in numbers:
            self.states[number] = QueuedJob(state, reason, "N/A")

    def arrive(self, watch: Watchdog, *names: str) -> None:
        for name in names:
            self.scheduler.workers[f"tcp://{name}"] = SimpleNamespace(name=name, address=f"tcp://{name}", executing={})
            watch._arrivals.add_worker(self.scheduler, f"tcp://{name}")

    def leave(self, *names: str) -> None:
        for name in names:
            del self.scheduler.workers[f"tcp://{name}"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


@pytest.fixture
def site(clock: Clock) -> Site:
    return Site()


def watching(site: Site, workers: int | None = 2, *, blind: bool = False) -> Watchdog:
    """A watch that has submitted its first jobs."""
    watch = Watchdog(site, None if blind else site, workers, site.refusals, site.said.append)
    site.sync(watch._correct, [])
    return watch


def test_a_job_that_ended_is_replaced_under_a_new_name(site: Site) -> None:
    watch = watching(site)
    site.put("RUNNING", "1", "2")
    site.arrive(watch, "job-1", "job-2")
    watch._look()
    site.put("COMPLETED", "1")
    site.leave("job-1")
    watch._look()
    assert sorted(site.workers) == ["job-2", "job-3"]
    assert watch.replaced == 1
    assert watch.failure is None


def test_a_worker_whose_host_has_gone_without_a_word_is_dropped_with_its_job(site: Site) -> None:
    watch = watching(site)
    site.put("RUNNING", "1", "2")
    site.arrive(watch, "job-1-0", "job-1-1", "job-2-0", "job-2-1")  # two processes in each
    watch._look()
    site.put("NODE_FAIL", "1")
    watch._look()
    assert sorted(w.name for w in site.scheduler.workers.values()) == ["job-2-0", "job-2-1"]
    assert sorted(site.workers) == ["job-2", "job-3"]


def test_a_job_that_is_back_in_the_queue_is_replaced_and_one_that_waits_is_not(site: Site) -> None:
    watch = watching(site)
    watch._look()
    assert watch.replaced == 0
    site.put("RUNNING", "1")
    watch._look()
    site.put("PENDING", "1", reason="BeginTime")  # requeued, before or after its worker came
    watch._look()
    assert sorted(site.workers) == ["job-2", "job-3"]
    assert site.states["1"].state == "CANCELLED"


def test_a_job_that_is_not_listed_is_looked_for_twice(site: Site) -> None:
    watch = watching(site)
    del site.states["1"]
    watch._look()
    assert watch.replaced == 0
    watch._look()
    assert sorted(site.workers) == ["job-2", "job-3"]


def test_nothing_is_concluded_from_no_answer(site: Site) -> None:
    watch = watching(site)
    site.put("FAILED", "1", "2")
    site.answers = False
    for _ in range(5):
        watch._look()
    assert (watch.replaced, watch.failure) == (0, None)


def test_jobs_that_end_before_their_worker_comes_end_the_run_with_their_log(site: Site) -> None:
    watch = watching(site, 1)
    site.new_state = QueuedJob("FAILED", "NonZeroExitCode", "N/A")
    site.put("FAILED", "1")
    for _ in range(2):
        watch._look()
        assert watch.failure is None
    watch._look()
    assert "3 worker jobs in a row ended before their worker had started" in str(watch.failure)
    assert "job 3 ended" in str(watch.failure)


def test_one_bad_node_is_paused_for_and_said_however_many_workers_live(site: Site, clock: Clock) -> None:
    watch = watching(site, 3)
    site.put("RUNNING", "1", "2")
    site.arrive(watch, "job-1", "job-2")
    site.put("FAILED", "3")
    site.new_state = QueuedJob("FAILED", "NonZeroExitCode", "N/A")
    for _ in range(10):
        watch._look()
    assert site.submitted == 5  # three failures, and no more for now
    assert [text for text in site.said if "3 worker jobs in a row ended" in text]
    assert not watch.may_submit()
    clock.now += PAUSE_SECONDS + 1
    watch._look()
    watch._look()
    assert site.submitted == 6
    assert watch.failure is None


def test_a_worker_that_arrives_anew_lets_failures_be_forgotten(site: Site) -> None:
    watch = watching(site, 3)
    site.put("RUNNING", "1", "2", "3")
    site.arrive(watch, "job-1", "job-2")
    watch._look()
    for number in ("3", "4"):
        site.put("FAILED", number)
        watch._look()
    assert watch._failed_starts == 2
    site.put("RUNNING", "5")
    site.arrive(watch, "job-5")
    watch._look()
    site.put("CANCELLED", "5")
    site.leave("job-5")
    watch._look()
    site.put("FAILED", "6")
    watch._look()
    assert watch._failed_starts == 1


def test_jobs_that_fail_beside_others_that_are_starting_do_not_end_the_run_at_once(site: Site) -> None:
    watch = watching(site, 4)
    site.put("RUNNING", "4")
    for number in ("1", "2", "3"):
        site.put("FAILED", number)
    watch._look()
    assert watch.failure is None
    site.new_state = QueuedJob("FAILED", "NonZeroExitCode", "N/A")
    for _ in range(5):  # but not for ever
        watch._look()
        for number in [job.job_id for job in site.workers.values()]:
            site.put("RUNNING" if number == "4" else "FAILED", number)
    assert watch.failure is not None


def test_the_same_name_for_another_job_is_no_return_to_the_queue(site: Site) -> None:
    """Dask's adaptive scaling removes jobs, too: what is known of their names goes with them."""
    watch = watching(site, None)
    site.worker_spec["job-1"] = {}
    site.sync(site._correct_state)
    site.put("RUNNING", "1")
    site.arrive(watch, "job-1")
    watch._look()
    site.put("COMPLETED", "1")
    site.leave("job-1")
    watch._look()
    assert site.workers == {}
    site.worker_spec["job-1"] = {}  # given out again
    site.sync(site._correct_state)
    site.put("PENDING", "1", reason="Priority")
    watch._ran.clear()  # another number, in truth
    for _ in range(3):
        watch._look()
    assert list(site.workers) == ["job-1"]
    assert watch.replaced == 1


def test_a_job_that_adaptive_scaling_gives_up_meanwhile_has_not_failed(site: Site) -> None:
    watch = watching(site, None)
    for number in range(1, 5):
        site.worker_spec[f"job-{number}"] = {}
    site.sync(site._correct_state)

    def give_up() -> None:
        for number in ("1", "2", "3"):
            site.worker_spec.pop(f"job-{number}", None)
            site.put("CANCELLED", number)

    site.on_look = give_up
    watch._look()
    assert (watch.failure, watch.replaced, watch._failed_starts) == (None, 0, 0)


@pytest.mark.parametrize(
    ("reason", "ends"),
    [
        ("PartitionTimeLimit", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("AssocMaxWallDurationPerJobLimit", True),
        ("QOSMaxMemoryPerJob", True),
        ("MaxMemPerLimit", True),
        ("JobHeldAdmin", True),
        ("launch failed requeued held", True),
        ("launch_failed_requeued_held", True),
        ("QOSMaxJobsPerUserLimit", False),
        ("AssocGrpCpuLimit", False),
        ("JobHeldUser", False),
        ("Resources", False),
    ],
)
def test_a_wait_without_end_is_an_error_and_any_other_is_said(reason: str, ends: bool, site: Site) -> None:
    watch = watching(site)
    site.put("PENDING", "1", "2", reason=reason)
    watch._look()
    assert (NEVER.fullmatch(reason) is not None) is ends
    if ends:
        assert f"will never start: SLURM gives the reason {reason}" in str(watch.failure)
    else:
        assert watch.failure is None
        assert site.said == [f"waiting for workers, 2 jobs: 2 pending ({reason})"]


def test_a_refusal_ends_the_run_unless_it_may_pass_or_others_work(site: Site, clock: Clock) -> None:
    site.refusing = "sbatch: error: invalid account"
    watch = watching(site)
    watch._look()
    assert "invalid account" in str(watch.failure)

    passing = Site(refusing="Unable to contact slurm controller")
    watch = watching(passing)
    watch._look()
    assert watch.failure is None
    clock.now += 200
    watch._look()
    watch._look()
    assert watch.failure is not None

    some = Site()
    watch = watching(some, 1)
    watch.workers, some.refusing = 2, "sbatch: error: QOSMaxSubmitJobPerUserLimit"
    watch._look()
    before = some.submitted
    for _ in range(5):
        watch._look()
    assert watch.failure is None
    assert some.submitted == before  # tried again in a minute, not at each look


def test_without_a_view_of_the_queue_a_job_is_over_when_its_worker_stays_away(site: Site, clock: Clock) -> None:
    watch = watching(site, 1, blind=True)
    watch._look()
    site.arrive(watch, "job-1")
    watch._look()
    site.leave("job-1")
    watch._look()
    clock.now += 10
    site.arrive(watch, "job-1")  # back again
    watch._look()
    site.leave("job-1")
    watch._look()
    clock.now += 16
    watch._look()
    assert list(site.workers) == ["job-2"]


def test_without_a_view_of_the_queue_a_wait_for_workers_is_spoken_of_now_and_then(site: Site, clock: Clock) -> None:
    watch = watching(site, blind=True)
    for _ in range(600):
        watch._look()
        clock.now += 1
    assert 3 <= len(site.said) <= 6
    assert all("2 jobs submitted, none has come for" in text for text in site.said)
    site.arrive(watch, "job-1")
    watch._look()
    site.leave("job-1")
    watch._look()
    assert watch._silent_for == watchdog.SILENT_SECONDS


def test_a_look_that_finds_nothing_new_equals_the_one_before(site: Site) -> None:
    watch = watching(site)
    first, second = watch._look(), watch._look()
    assert first == second
    site.states["1"] = QueuedJob("PENDING", "Priority", "2030-01-01T00:00:00")  # SLURM's guess changes all the time
    assert watch._look() == first
    site.arrive(watch, "job-1")
    assert watch._changed.is_set()
    assert watch._look() != first


def test_a_task_that_outlives_worker_after_worker_ends_the_run_and_is_warned_of_before() -> None:
    tasks = LongTasks(3600.0)
    busy = {"a": frozenset({"strip-1"})}
    assert tasks.look(0, busy, frozenset({"strip-1"})) is None
    assert tasks.warning(1000) is None
    assert "a task has been running for" in str(tasks.warning(1900))
    assert tasks.warning(2000) is None  # said once
    now = 0.0
    for worker in ("b", "c"):
        now += 3500
        assert tasks.look(now, {worker: frozenset({"strip-1"})}, frozenset({"strip-1"})) is None
    found = tasks.look(now + 3500, {}, frozenset({"strip-1"}))
    assert "It did not end on 3 workers" in str(found)
    assert "`walltime`" in str(found)


def test_tasks_that_end_or_were_begun_late_say_nothing_of_the_time_that_workers_have() -> None:
    tasks, unfinished = LongTasks(3600.0), frozenset({"strip-1"})
    now = 0.0
    for worker in "abcdefgh":  # pushed aside soon
        assert tasks.look(now, {worker: frozenset({"strip-1"})}, unfinished) is None
        now += 600
    for worker in "abcdefgh":  # done in time
        assert tasks.look(now, {worker: frozenset({"strip-2"})}, frozenset({"strip-2"})) is None
        now += 3000
        assert tasks.look(now, {}, frozenset()) is None


def test_the_time_that_a_worker_has_is_its_lifetime_or_its_walltime() -> None:
    assert worker_seconds(["--nthreads", "1", *lifetime_arguments("10:00:00")], "10:00:00") == 30600
    assert worker_seconds(["--lifetime=5m"], "10:00:00") == 300
    assert worker_seconds(["--nthreads", "1"], "10:00:00") == 36000
    assert worker_seconds(["--nthreads", "1"], None) is None
