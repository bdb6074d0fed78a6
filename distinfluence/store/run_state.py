"""What a run is doing, in a file next to its output, readable without its scheduler from the first moment to the last.

The file has a name of its own (`.influences.zarr.run.json`), is replaced whole every few seconds, and goes when the run
is complete: the result then says so itself. A run that was killed leaves it, with the time when it was last heard of.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from distinfluence.atomic import appearing

HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # after which a run on another host counts as dead: shared file systems may show it late


@dataclass(frozen=True)
class RunState:
    """Holds what a run is doing.

    Attributes:
        host: Host of the driving process.
        pid: Process id of the driving process.
        part: K/N of a run that makes a part of the strips, else empty.
        began: When the run started, in seconds since 1970.
        heard: When the run last gave a sign of life, in seconds since 1970.
        stage: The current stage.
        done: How much of the stage is done, in `unit`.
        total: How much there is to do, in `unit`; None if not known.
        unit: The unit of `done` and `total`.
        seconds: How long the stage has taken so far.
        ended: "", "stopped" (by Ctrl-C or SIGTERM) or "failed".
        error: The error of a run that failed.
    """

    host: str
    pid: int
    part: str
    began: float
    heard: float
    stage: str = ""
    done: int = 0
    total: int | None = None
    unit: str = ""
    seconds: float = 0.0
    ended: str = ""
    error: str = ""

    @classmethod
    def here(cls, part: str = "") -> RunState:
        """Return the state of a run which this process begins now.

        Args:
            part: K/N of a run that makes a part of the strips, else empty.
        """
        now = time.time()
        return cls(socket.gethostname(), os.getpid(), part, now, now)

    def condition(self) -> str:
        """Return running, dead, stopped, failed, or silent (paused, or on a host that cannot be asked)."""
        if self.ended:
            return self.ended
        if self.host == socket.gethostname() and not _is_there(self.pid):
            return "dead"
        if time.time() - self.heard <= SILENT_SECONDS:
            return "running"
        return "silent" if self.host == socket.gethostname() else "dead"

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        done = f" {self.done}{of} {self.unit}" if self.done or of else ""
        pace = pace_of(self.done, self.total, self.seconds)
        at = f"{self.stage}:{done}{f', {pace}' if pace else ''}" if self.stage else "beginning"
        part = f" part {self.part}" if self.part else ""
        ago = max(0.0, time.time() - self.heard)
        error = f": {self.error}" if self.error else ""
        return (
            f"run{part} {self.condition()} ({at}; process {self.pid} on {self.host}, began "
            f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.began))}, heard of {ago:.0f} s ago){error}"
        )


def pace_of(done: int, total: int | None, seconds: float) -> str:
    """Return a rate and the time left, as far as they can be told: "1.2 a second, about 40 s left"."""
    if not done or seconds <= 0 or total is None:
        return ""
    rate = done / seconds
    pace = f"{rate:.1f} a second" if rate >= 1 else f"{1 / rate:.1f} s each"
    left = (total - done) / rate
    return f"{pace}, about {_duration(left)} left" if done < total else pace


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def manifest_file(output: Path, part: str = "") -> Path:
    """Return the file in which a run says what it is doing."""
    return output.with_name(f".{output.name}.run{'-' + part.replace('/', '-of-') if part else ''}.json")


def write_state(file: Path, state: RunState) -> None:
    """Replace the file. What the file system says is not raised: no run ends for the sake of telling of it."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with appearing(file) as partial:
            partial.write_text(json.dumps(asdict(state), indent=1))


def read_runs(output: Path) -> list[RunState]:
    """Return the runs that are at work on the result at `output`, or died at it; also before there is one."""
    known = {field.name for field in fields(RunState)}
    found = []
    for file in sorted(output.parent.glob(f".{output.name}.run*.json")) if output.parent.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, TypeError):  # just replaced, or somebody else's
            content = json.loads(file.read_text())
            found.append(RunState(**{name: value for name, value in content.items() if name in known}))
    return found


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
