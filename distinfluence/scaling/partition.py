"""Several runs that work on one result without talking to each other: each makes its share of the strips.

They meet in files only. What must be done by one of them (begin the result, fit, finish) is done under a lock that the
system releases when its holder dies; what a run finds made by another it takes as it is.
"""

import errno
import fcntl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distinfluence.errors import SettingError
from distinfluence.scaling.scratch import scratch_errors


@dataclass(frozen=True)
class Partition:
    """Run number `part` of `parts`, counted from 0.

    Attributes:
        part: Number of the run.
        parts: Number of runs.
        folder: Folder for the lock, the same for all runs; None for a run that shares its result with no other.
    """

    part: int
    parts: int
    folder: Path | None

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise SettingError(
                f"`part` must be K/N with K from 0 to N - 1, got {self.part}/{self.parts}. In an array of jobs: "
                "--array=0-15 and --part $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT."
            )

    @classmethod
    def whole(cls) -> "Partition":
        """Return the partition of a single run that makes everything, without a lock."""
        return cls(0, 1, None)

    @property
    def shared(self) -> bool:
        """Whether other runs may work on the same result."""
        return self.folder is not None

    @classmethod
    def parse(cls, text: str, folder: Path) -> "Partition":
        """Read "K/N". Raises SettingError."""
        part, slash, parts = text.partition("/")
        if not (slash and part.isdigit() and parts.isdigit()):
            raise SettingError(f"`part` must be K/N with K from 0 to N - 1, got {text!r}.")
        return cls(int(part), int(parts), folder)

    def of(self, strips: Iterable[int]) -> list[int]:
        """Those of the strips that are this run's."""
        return [strip for strip in strips if strip % self.parts == self.part]

    def turned(self, items: Sequence[int]) -> list[int]:
        """All of the items, beginning at another one in each run."""
        first = len(items) * self.part // self.parts
        return [*items[first:], *items[:first]]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other run is here. Where the file system has no locks, nobody waits."""
        if self.folder is None:
            yield
            return
        with scratch_errors(self.folder, "its lock"):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
            yield  # closing the file gives the lock back
