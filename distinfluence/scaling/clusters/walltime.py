"""The time that a worker job has: workers leave before it is over, and tasks that never fit into it are found out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from dask.utils import format_time, parse_timedelta

from distinfluence.errors import SettingError
from distinfluence.scaling.clusters.slurm import walltime_seconds

TRIES = 3  # workers that a task may outlive


def lifetime_arguments(walltime: str) -> list[str]:
    """Return arguments with which workers leave before their job is killed.

    They do not leave all at once, so that they can hand over what others need.
    """
    limit = _limit(walltime)
    if limit is None:
        return []
    reserve = min(max(60.0, limit / 10), 1800.0, limit / 3)
    stagger = limit / 10
    return ["--lifetime", f"{limit - reserve - stagger:.0f}s", "--lifetime-stagger", f"{stagger:.0f}s"]


def worker_seconds(worker_arguments: Sequence[str], walltime: str | None) -> float | None:
    """Return the seconds until a worker leaves by itself or is killed, None if it has all the time that it wants."""
    for option, value in zip(worker_arguments, [*worker_arguments[1:], ""], strict=True):
        if option == "--lifetime" or option.startswith("--lifetime="):
            return float(parse_timedelta(option.partition("=")[2] or value, default="s"))
    return None if walltime is None else _limit(walltime)


def _limit(walltime: str) -> float | None:
    try:
        return walltime_seconds(walltime)
    except ValueError:
        raise SettingError(
            f"`settings.walltime` of the cluster must be a time as sbatch reads it, got {walltime!r}. Write "
            "hours:minutes:seconds ('01:30:00'), days-hours ('2-12') or minutes ('90')."
        ) from None


class LongTasks:
    """What workers are at, from look to look; tasks that outlive one worker after the other would be begun for ever.

    seconds: that a worker has. Only a task that ran for half of them counts: one that was begun late says nothing.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._since: dict[tuple[str, str], float] = {}
        self._outlived: Counter[str] = Counter()
        self._warned = False

    def look(self, now: float, executing: Mapping[str, AbstractSet[str]], unfinished: AbstractSet[str]) -> str | None:
        """Return what must end the run, if anything. executing: worker → keys; unfinished: keys still to be done."""
        there = {(worker, key) for worker, keys in executing.items() for key in keys}
        for (worker, key), since in self._since.items():
            if worker not in executing and key in unfinished and now - since >= self.seconds / 2:
                self._outlived[key] += 1
                if self._outlived[key] >= TRIES:
                    return (
                        f"{self._advice(now - since)} It did not end on {TRIES} workers, one after the other: that is "
                        "the same for all of its kind."
                    )
        for key in set(self._outlived) - unfinished:
            del self._outlived[key]
        self._since = {place: self._since.get(place, now) for place in there}
        return None

    def warning(self, now: float) -> str | None:
        """Return, once, what may come of the longest task."""
        longest = max((now - since for since in self._since.values()), default=0.0)
        if self._warned or longest < self.seconds / 2:
            return None
        self._warned = True
        return self._advice(longest)

    def _advice(self, ran: float) -> str:
        return (
            f"a task has been running for {format_time(ran)}, and a worker has {format_time(self.seconds)} in all. "
            "What outlives its worker is begun again: give jobs a longer `walltime`, or make tasks shorter with "
            "smaller `chunks` (a strip has `train` samples, a solve `test`)."
        )
