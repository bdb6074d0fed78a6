"""Workers as batch jobs, through dask-jobqueue: one job for each worker, watched, and gone when the run is over."""

import asyncio
import functools
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
from distributed import Adaptive, Client, Status

from distinfluence.errors import ClusterError, SettingError
from distinfluence.scaling.clusters.job_settings import cluster_class, is_slurm, job_arguments, seconds_of_workers
from distinfluence.scaling.clusters.orphan_guard import Guard
from distinfluence.scaling.clusters.slurm import SlurmQueue, submission_environment, was_requeued
from distinfluence.scaling.clusters.watchdog import Watchdog

POLL_SECONDS = 0.2
CLOSE_SECONDS = 60.0
ADAPT_SECONDS, ADAPT_LOOKS = 5, 12  # between looks of adaptive scaling, and looks before it gives up a worker


@contextmanager
def job_cluster(
    kind: str,
    jobs: tuple[int, int],
    settings: Mapping[str, object],
    *,
    timeout: float | None,
    guarded: bool,
    environment: Mapping[str, str],
    folder: Path,
    announce: Callable[[str], None],
) -> Iterator[Client]:
    """Yield a client of a scheduler in this process whose workers are jobs, which are gone afterwards.

    kind, settings, timeout: see `ClusterSpec`. jobs: the least and the most of them. guarded: whether the jobs are
    cancelled also if this process is killed. environment: of the workers. folder: for logs and certificates, seen by
    every node. Entered when the first worker has come. Raises ClusterError with what the queue or the jobs' logs say
    when jobs are refused or end before they work, SettingError for settings that dask-jobqueue does not know.
    """
    asked = cluster_class(kind)
    arguments = job_arguments(asked, settings, environment, folder)
    queue = SlurmQueue() if is_slurm(asked) else None
    name = str(arguments["job_name"])
    if queue is not None and was_requeued() and (left := queue.cancel_named(name)):
        announce(f"cancelled {left} worker jobs that this job's last start had left")
    refusals: list[str] = []
    # Dask would cancel a job this long after its worker left; the watch decides that
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "30 days"}):
        guard = _guard(asked, name if queue is not None else None, folder) if guarded else None
        try:
            cluster = _scheduler(asked, arguments, refusals, guard)
            least, most = jobs
            watchdog = Watchdog(cluster, queue, most if least == most else None, refusals, announce)
            watchdog.worker_seconds = seconds_of_workers(asked, arguments)
            try:
                watchdog.start()
                if least < most:
                    _adapt(cluster, watchdog, least, most)
                yield from _watched_client(cluster, watchdog, timeout)
            finally:
                watchdog.stop()
                _close(cluster, queue, name)
        finally:
            if guard is not None:
                guard.release()


def _guard(asked: Any, name: str | None, folder: Path) -> Guard | None:
    """Return what cancels the jobs if this process is killed; None for jobs that end with their submitter."""
    if asked.job_cls.cancel_command is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return Guard(shlex.split(asked.job_cls.cancel_command), name, folder / "guard.log", submission_environment())


def _adapt(cluster: Any, watchdog: Watchdog, minimum: int, maximum: int) -> None:
    """Let Dask say how many jobs there are, between two numbers of them."""
    cluster.adapt(
        Adaptive=functools.partial(_Adapting, watchdog),
        minimum_jobs=minimum,
        maximum_jobs=maximum,
        interval=f"{ADAPT_SECONDS} s",
        wait_count=ADAPT_LOOKS,
    )
    cluster.scale(jobs=minimum)  # now, not at the first look


class _Adapting(Adaptive):
    """Asks for no more jobs while the watch waits before it submits again."""

    def __init__(self, watchdog: Watchdog, cluster: Any, **options: Any) -> None:
        super().__init__(cluster, **options)
        self._watchdog = watchdog

    async def safe_target(self) -> int:
        """How many workers there should be."""
        target = int(await super().safe_target())
        return target if self._watchdog.may_submit() else min(target, len(self.plan))


def _watched_client(cluster: Any, watchdog: Watchdog, timeout: float | None) -> Iterator[Client]:
    """Yield a client once there is a worker; raise what the watch says where it gave the run up."""
    with Client(cluster) as client:
        # whatever the run waits for, it stops waiting when its client has closed
        watchdog.on_failure = lambda: client.close(timeout=5)
        try:
            _wait_for_worker(watchdog, timeout)
            yield client
        except (Exception, asyncio.CancelledError) as error:
            if watchdog.failure is None:
                raise
            raise ClusterError(watchdog.failure) from error


def _wait_for_worker(watchdog: Watchdog, timeout: float | None) -> None:
    end = None if timeout is None else time.monotonic() + timeout
    while not watchdog.has_workers():
        if watchdog.failure is not None:
            raise ClusterError(watchdog.failure)
        if end is not None and time.monotonic() > end:
            raise ClusterError(
                f"no worker job started within `timeout`, {timeout:g} s; {watchdog.last_said or 'nothing is known'}. "
                "Pass a longer one, or none to wait as long as the queue takes."
            )
        time.sleep(POLL_SECONDS)


def _close(cluster: Any, queue: SlurmQueue | None, name: str) -> None:
    """Close the cluster, which cancels its jobs, and end what that may have left: a job whose number nobody has yet."""
    try:
        with suppress(Exception):  # a scheduler that has gone is no reason to leave jobs behind
            cluster.close(timeout=CLOSE_SECONDS)
    finally:
        if queue is not None:
            queue.cancel_named(name)


def _scheduler(asked: Any, arguments: dict[str, Any], refusals: list[str], guard: Guard | None) -> Any:
    """Return the cluster, with jobs that note refusals, and none of them submitted yet."""
    named = _naming(asked)
    cluster = named.__new__(named)
    try:
        cluster.__init__(job_cls=_noting(asked.job_cls, refusals, guard), **arguments)
        return cluster
    except (ValueError, TypeError) as error:
        cluster.status = Status.closed  # it never opened: nothing is left for its finalizer to warn of
        raise SettingError(f"`settings` of the cluster: {error}") from error
    except (OSError, RuntimeError) as error:
        raise ClusterError(f"the scheduler cannot start here: {error}. Correct `settings` of the cluster.") from error


def _naming(asked: Any) -> Any:
    """Have the class of clusters give no job the name of an earlier one, of which too much is known.

    Dask gives the last name out again. The new job would then count as one whose worker had come before.
    """

    class NamingCluster(asked):  # type: ignore[misc]  # dask-jobqueue has no types
        def new_worker_spec(self) -> Any:
            found = super().new_worker_spec()
            self._i += 1
            return found

    NamingCluster.__name__ = asked.__name__
    return NamingCluster


def _noting(job_class: Any, refusals: list[str], guard: Guard | None) -> Any:
    """Have the class of jobs note why one could not be submitted, and keep our own job's variables from it."""

    class NotingJob(job_class):  # type: ignore[misc]  # dask-jobqueue has no types
        async def start(self) -> None:
            try:
                await super().start()
            except RuntimeError as error:
                refusals.append(str(error).rpartition("stderr:\n")[2].strip() or str(error))
            except OSError as error:
                command = shlex.split(self.submit_command)[0] if self.submit_command else "the job's command"
                refusals.append(f"{command}: {error.strerror or error}. Run this where jobs can be submitted.")
            except Exception as error:  # a class of clusters that is not dask-jobqueue's own may raise anything
                refusals.append(f"{type(error).__name__}: {error}")
            if guard is not None and self.job_id:
                guard.note(str(self.job_id))
            self.status = Status.running  # a job without a number: for the watch to deal with

        @staticmethod
        async def _call(cmd: list[str], **options: Any) -> Any:
            # a session of its own: Ctrl-C at a terminal would reach sbatch and scancel too
            own = {"env": submission_environment(), "start_new_session": True}
            return await job_class._call(cmd, **{**own, **options})

        async def close(self) -> None:
            if self.job_id:
                with suppress(RuntimeError, OSError):  # it has gone already
                    await super().close()
            self.status = Status.closed  # what the cluster asserts of it at the end

    NotingJob.__name__ = job_class.__name__
    return NotingJob
