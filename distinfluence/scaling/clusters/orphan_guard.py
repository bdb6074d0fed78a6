"""A process that cancels the jobs of a driver which died before it could: kill -9, no memory left, a crash.

It waits at a pipe from the driver, in a session of its own. Where the pipe ends without a word of release, the driver
is gone. It is run as a script, with the standard library alone, so that it is there at once and takes little memory.
Whatever ends every process of the driver's host or batch job ends the guard as well.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

RELEASED = "released"
SECONDS, MOST_SECONDS = 2.0, 300.0  # between two tries to cancel, and after which SLURM counts as gone for good
ANSWER_SECONDS = 30.0


class Guard:
    """The driver's end of the pipe.

    Args:
        cancel: The command that ends jobs by number.
        name: If given, the jobs belong to SLURM, and all jobs of this name are ended.
        log: A file that says what the guard did, if it had to act.
        environment: Environment variables of the guard process.
    """

    def __init__(self, cancel: Sequence[str], name: str | None, log: Path, environment: dict[str, str]) -> None:
        order = json.dumps({"cancel": list(cancel), "name": name, "log": str(log), "parent": os.getpid()})
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), order],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            start_new_session=True,
        )

    def note(self, number: str) -> None:
        """Note that a job was submitted."""
        self._write(number)

    def release(self) -> None:
        """All jobs are over: nothing is left to guard."""
        self._write(RELEASED)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # somebody has ended it
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()


def left_behind(parent: int) -> list[str] | None:
    """Wait for the driver's end; the numbers that it noted, None if it released the guard."""
    numbers: list[str] = []
    rest = b""
    while True:
        ready, _, _ = select.select([0], [], [], 1.0)
        if not ready:
            if os.getppid() != parent:  # a child of the driver's may hold the pipe open
                return numbers
            continue
        got = os.read(0, 65536)
        if not got:
            return numbers
        *lines, rest = (rest + got).split(b"\n")
        if RELEASED.encode() in lines:
            return None
        numbers += [line.decode() for line in lines]


def cancel_numbers(cancel: Sequence[str], numbers: Sequence[str]) -> bool:
    """Say whether the command that ends these jobs went well in the end."""
    for _ in range(3 if numbers else 0):
        if _run([*cancel, *numbers]) is not None:
            return True
        time.sleep(SECONDS)
    return not numbers


def cancel_name(cancel: Sequence[str], name: str) -> bool:
    """Say whether SLURM has no job of this name any more, twice in a row: one may have been on its way to it."""
    user, empty = str(os.getuid()), 0
    end = time.monotonic() + MOST_SECONDS
    while time.monotonic() < end:
        _run([*cancel, f"--user={user}", f"--name={name}"])
        listed = _run(["squeue", "-h", "-u", user, "-n", name, "-t", "PENDING,CONFIGURING,RUNNING,SUSPENDED"])
        empty = empty + 1 if listed == "" else 0
        if empty == 2:
            return True
        time.sleep(SECONDS)
    return False


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main(order: str) -> None:
    """Guard the driver's jobs; order: JSON with `cancel`, `name`, `log` and `parent`, see `Guard`."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    asked = json.loads(order)
    numbers = left_behind(asked["parent"])
    if numbers is None:
        return
    name = asked["name"]
    done = cancel_name(asked["cancel"], name) if name else cancel_numbers(asked["cancel"], numbers)
    with open(asked["log"], "a") as log:
        what = f"jobs named {name}" if name else f"jobs {' '.join(numbers)}"
        how = "cancelled" if done else "could not be cancelled"
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: driver {asked['parent']} died; its {what} {how}\n")


if __name__ == "__main__":
    main(sys.argv[1])
