"""The steps of continuous integration, side by side where they can be, and what each of them took.

Run: python3 -m tests.steps [STEP …]      .ci/run runs all of them

A step starts when the steps before it have ended. What it prints is shown in one piece when it ends. A step that
passes its limit is ended with everything below it, and shows the stacks of those processes first. The last lines are a
table with one line a step. Standard library only: the first steps install the rest.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import IO

if __package__ in (None, ""):
    sys.exit("run it as a module: python3 -m tests.steps")

from tests.processes import ROOT, below, stacks

SITE = ("docs/_build/html", "build/screenshots/site")


@dataclass(frozen=True)
class Step:
    """A command with its limit in seconds.

    `needs` names the steps that have to end well before it starts, `after` those that have to end in some way.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


SET_UP = ("packages", "environment")
STEPS = (
    Step("packages", ("make", "browser", "slurm"), 900),
    Step("environment", ("make", "install"), 1200),
    Step("test", ("make", "-j", "2", "test"), 1200, SET_UP),
    # These wait for the queue half of the time, and tests for workers that they killed: together they fill the cores.
    Step("slurm-test", ("make", "slurm-test"), 1200, SET_UP),
    Step("docs", ("make", "docs"), 600, SET_UP, ("slurm-test",)),
    Step("site", (".venv/bin/python", "docs/make_screenshots.py", *SITE), 600, ("docs",)),
    Step("wheel", ("make", "wheel-test"), 600, SET_UP, ("slurm-test",)),
    Step("tutorial", ("make", "tutorial-test"), 900, SET_UP, ("wheel",)),
)


@dataclass
class Running:
    """A step under way."""

    step: Step
    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began


@dataclass(frozen=True)
class Ended:
    """What became of a step. cpu: seconds of user and system time of its processes that were waited for."""

    how: str
    seconds: float = 0.0
    cpu: float = 0.0

    @property
    def well(self) -> bool:
        """Whether the steps after it may start."""
        return self.how == "passed"


def run(steps: Sequence[Step]) -> dict[str, Ended]:
    """Run the steps and show what they print.

    Args:
        steps: With every step that one of them names; in any order.

    Returns:
        What became of each step, in the order in which they ended.
    """
    waiting, running, ended = list(steps), list[Running](), dict[str, Ended]()
    try:
        while waiting or running:
            for step in [step for step in waiting if {*step.needs, *step.after} <= set(ended)]:
                waiting.remove(step)
                if all(ended[name].well for name in step.needs):
                    running.append(_start(step))
                else:
                    ended[step.name] = Ended("not run")
            for each in list(running):
                result = _look(each)
                if result is not None:
                    running.remove(each)
                    ended[each.step.name] = result
                    _show(each, result)
            time.sleep(0.1)
    finally:
        for each in running:
            _end(each.process.pid)
    return ended


def _start(step: Step) -> Running:
    print(f"--- {step.name} starts: {' '.join(step.command)}", flush=True)
    output = tempfile.TemporaryFile()  # noqa: SIM115  # `_show` closes it
    process = subprocess.Popen(
        step.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    return Running(step, process, output)


def _look(running: Running) -> Ended | None:
    """Return what became of the step if it has ended, or has to."""
    pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
    if pid:
        running.process.returncode = os.waitstatus_to_exitcode(status)
        how = "passed" if running.process.returncode == 0 else f"failed with status {running.process.returncode}"
        return Ended(how, running.seconds, usage.ru_utime + usage.ru_stime)
    if running.seconds < running.step.limit:
        return None
    left = [running.process.pid, *below(running.process.pid)]
    running.output.write(f"\n{stacks(left)}\n".encode())
    _end(running.process.pid)
    running.process.wait()
    return Ended(f"did not end within {running.step.limit:g} s", running.seconds)


def _end(pid: int) -> None:
    """Kill a process and everything below it."""
    for each in [pid, *below(pid)]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _show(running: Running, result: Ended) -> None:
    running.output.seek(0)
    text = running.output.read().decode(errors="replace").rstrip()
    running.output.close()
    print(f"=== {running.step.name} {result.how}, {result.seconds:.0f} s\n{text}", flush=True)


def table(ended: dict[str, Ended], seconds: float) -> str:
    """Return one line a step: seconds, seconds of CPU, and what became of it."""
    lines = [f"{name:<12} {step.seconds:6.0f} s {step.cpu:6.0f} s of CPU  {step.how}" for name, step in ended.items()]
    return "\n".join([*lines, f"{'all':<12} {seconds:6.0f} s {sum(s.cpu for s in ended.values()):6.0f} s of CPU"])


def main(names: Sequence[str]) -> None:
    """Run the steps that are named, or all."""
    unknown = set(names) - {step.name for step in STEPS}
    if unknown:
        sys.exit(f"no such step: {', '.join(sorted(unknown))}. There are {', '.join(step.name for step in STEPS)}.")
    known = {step.name for step in STEPS if not names or step.name in names}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the steps that are under way
    began = time.monotonic()
    ended = run(
        [
            replace(step, needs=tuple(known.intersection(step.needs)), after=tuple(known.intersection(step.after)))
            for step in STEPS
            if step.name in known
        ]
    )
    print(f"\n{table(ended, time.monotonic() - began)}", flush=True)
    sys.exit(not all(step.well for step in ended.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
