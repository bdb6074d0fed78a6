"""What SLURM says of jobs: where they stand, why they ended, and the end of their logs."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ANSWER_SECONDS = 30.0  # after which a command of SLURM counts as unanswered
CANCEL_TRIES, CANCEL_SECONDS = 5, 2.0  # to end jobs by their name, and between two of them
LOG_LINES = 12  # of a failed job's log, in an error
THERE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"})
RAN = THERE - {"PENDING", "CONFIGURING"}

# reasons of a pending job that no waiting mends
NEVER = re.compile(
    r"AccountNotAllowed|BadConstraints|DependencyNeverSatisfied|InvalidAccount|InvalidQOS|JobHeldAdmin|MaxMemPerLimit"
    r"|PartitionNodeLimit|PartitionTimeLimit|QOSNotAllowed|(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?|QOSMin\w+"
    r"|launch.failed.requeued.held"
)
# what the output variables of one job would do to another that is submitted from within it
PASSED_ON = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS"})
# a refusal that may be another answer in a minute
PASSING = re.compile(r"timed out|unable to contact|temporarily|try again|communication connection failure", re.I)


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue lists it.

    Attributes:
        state: The state in SLURM's words.
        reason: Why the job waits.
        starts: When SLURM expects it to start.
    """

    state: str
    reason: str
    starts: str


class SlurmQueue:
    """Jobs of this user."""

    def look(self, numbers: Iterable[str]) -> Mapping[str, QueuedJob] | None:
        """Return the jobs of these numbers, also if they ended in the last minutes; None if SLURM does not answer."""
        asked = ",".join(numbers)
        answer = _squeue("--states=all", "-j", asked, "-o", "%A|%T|%r|%S") if asked else ""
        if answer is None:
            return None
        rows = (line.split("|") for line in answer.splitlines() if line.count("|") == 3)
        return {number: QueuedJob(*rest) for number, *rest in rows}

    def named(self, name: str) -> list[str] | None:
        """Return the numbers of the jobs of this name that are not over; None if SLURM does not answer."""
        answer = _squeue("-n", name, "-o", "%A|%T")
        if answer is None:
            return None
        return [number for number, _, state in (line.partition("|") for line in answer.splitlines()) if state in THERE]

    def cancel_named(self, name: str) -> int:
        """End all jobs of this name, also one that only now appears, and return how many there were.

        After some tries it gives up.
        """
        found: set[str] = set()
        if shutil.which("squeue") is None:
            return 0  # no answer, however often one asks
        for attempt in range(CANCEL_TRIES):
            if attempt:
                time.sleep(CANCEL_SECONDS)
            left = self.named(name)
            if left == []:
                break
            found.update(left or ())
            self.cancel(left or ())
        return len(found)

    def explain(self, number: str) -> str:
        """Say how a job ended, with the end of its log."""
        record = _answer("scontrol", "show", "job", number) or ""
        found = dict(re.findall(r"^\s*(StdErr|StdOut)=(.*)$", record, re.MULTILINE))
        found |= dict(re.findall(r"\b(JobState|Reason|ExitCode|NodeList)=(\S+)", record))
        lines = [f"job {number} ended as {found.get('JobState', 'unknown')} on {found.get('NodeList', 'no node')}"]
        lines[0] += f", exit code {found.get('ExitCode', 'unknown')}, reason {found.get('Reason', 'unknown')}"
        for log in dict.fromkeys(found[name] for name in ("StdErr", "StdOut") if name in found):
            log = re.sub("%[JjA]", number, log)  # before SLURM 23 the name is shown as it was given
            end = log_end(Path(log))
            if end:
                lines.append(f"the end of {log}:\n{end}")
        return "\n".join(lines) if len(lines) > 1 else f"{lines[0]}; it wrote no log"

    def cancel(self, numbers: Iterable[str]) -> None:
        """End these jobs; those that have ended already are no error."""
        numbers = list(numbers)
        if numbers:
            _answer("scancel", *numbers)


def log_end(path: Path) -> str:
    """Return the last lines of a log, indented; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-LOG_LINES:])


def submission_environment() -> dict[str, str]:
    """Return this process's environment without what SLURM told the job that it may be running in."""
    return {name: v for name, v in os.environ.items() if not name.startswith("SLURM_") or name in PASSED_ON}


def was_requeued() -> bool:
    """Say whether this process runs in a job that SLURM started before.

    Returns:
        True after a requeue.
    """
    return batch_job() is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def batch_job() -> str | None:
    """Return SLURM's number of the job that this process runs in, the same each time it is started; None outside."""
    return os.environ.get("SLURM_JOB_ID")


def walltime_seconds(text: str) -> float | None:
    """Return the seconds of a time limit as sbatch reads it ("30", "10:00", "01:00:00", "2-12"); None without end.

    Raises:
        ValueError: The text is not a time limit.
    """
    if text.strip().upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", text.strip()):
        raise ValueError(text)
    days, dash, clock = text.strip().rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # D-H[:M[:S]]
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:  # M, M:S or H:M:S
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def _squeue(*options: str) -> str | None:
    return _answer("squeue", "-h", "-u", str(os.getuid()), *options)


def _answer(*command: str) -> str | None:
    """Run a command of SLURM: what it writes, None if it fails, nothing for numbers that SLURM has forgotten.

    The output is empty for jobs so old that SLURM has forgotten their numbers. The command gets a session of its own:
    Ctrl-C at a terminal would reach it too, just when it is to cancel jobs.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            env=submission_environment(),
            start_new_session=True,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" in done.stderr:
        return ""
    return done.stdout if done.returncode == 0 else None
