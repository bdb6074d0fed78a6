"""What SLURM says of jobs: where they stand, why they ended, and the end of their logs."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ANSWER_SECONDS = 30.0  # after which a command of SLURM counts as unanswered
LOG_LINES = 12  # of a failed job's log, in an error
THERE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"})
RAN = THERE - {"PENDING", "CONFIGURING"}

# reasons of a pending job that no waiting mends
NEVER = frozenset(
    {
        "AccountNotAllowed",
        "BadConstraints",
        "DependencyNeverSatisfied",
        "InvalidAccount",
        "InvalidQOS",
        "PartitionNodeLimit",
        "PartitionTimeLimit",
        "QOSNotAllowed",
    }
)
# what the output variables of one job would do to another that is submitted from within it
PASSED_ON = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS"})
# a refusal that may be another answer in a minute
PASSING = re.compile(r"timed out|unable to contact|temporarily|try again|communication connection failure", re.I)


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue lists it. state: in SLURM's words; reason: why it waits; starts: when SLURM expects it to."""

    state: str
    reason: str
    starts: str
    comment: str


class SlurmQueue:
    """The jobs of this user."""

    def look(self) -> Mapping[str, QueuedJob] | None:
        """Job number → job, also of those that ended in the last minutes; None if SLURM does not answer."""
        answer = _answer("squeue", "-h", "-u", str(os.getuid()), "--states=all", "-o", "%A|%T|%r|%S|%k")
        if answer is None:
            return None
        rows = (line.split("|", 4) for line in answer.splitlines() if line.count("|") >= 4)
        return {number: QueuedJob(*rest) for number, *rest in rows}

    def explain(self, number: str) -> str:
        """How a job ended, and the end of its log."""
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
    """The last lines of a log, indented; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-LOG_LINES:])


def submission_environment() -> dict[str, str]:
    """This process's environment without what SLURM told the job that it may be running in."""
    return {name: v for name, v in os.environ.items() if not name.startswith("SLURM_") or name in PASSED_ON}


def was_requeued() -> bool:
    """Whether this process runs in a job that SLURM started before."""
    return "SLURM_JOB_ID" in os.environ and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def walltime_seconds(text: str) -> float | None:
    """Seconds of a time limit as sbatch reads it ("30", "10:00", "01:00:00", "2-12"); None for one without end.

    Raises ValueError if it is none.
    """
    if text.strip().upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    days, dash, clock = text.strip().rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if len(parts) > 3 or (dash and not days):
        raise ValueError(text)
    if dash:  # D-H[:M[:S]]
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:  # M, M:S or H:M:S
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


def _answer(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=submission_environment(), check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
