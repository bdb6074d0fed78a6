"""Processes that tests start, and what they are doing: each ends with its test, together with everything it started.

`finished` runs a command to its end, `started` keeps one running for the length of a `with` block. Both put it in a
process group of its own, which is killed at the end. `stacks` shows where processes are, and is what a test or a step
that runs out of time leaves behind. Standard library only: tests/steps.py uses this before anything is installed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 150.0  # Seconds that a command of a test may take unless the test says otherwise.
_SPY = (Path(sys.prefix) / "bin" / "py-spy", ROOT / ".venv" / "bin" / "py-spy")


@contextlib.contextmanager
def started(command: Sequence[object], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """Run a command while the block lasts, then kill its process group. Options as of `subprocess.Popen`."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, **{"text": True, "start_new_session": True, **options}) as process:
        try:
            yield process
        finally:
            kill_group(process)


def finished(
    command: Sequence[object], *, limit: float = LIMIT, given: str | None = None, check: bool = False, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end and return its status with what it wrote.

    Args:
        command: The program and its arguments.
        limit: Seconds after which the group is killed and the stacks of its processes are shown.
        given: Text for its standard input.
        check: Whether a status other than 0 is an error.
        **options: As of `subprocess.Popen`; both outputs are captured as text unless they say otherwise.

    Raises:
        AssertionError: If the command took too long, or failed and `check` is set; with everything it wrote.
    """
    stdin = subprocess.DEVNULL if given is None else subprocess.PIPE
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(command, **(pipes | options)) as process:
        try:
            output, errors = process.communicate(given, timeout=limit)
        except subprocess.TimeoutExpired:
            where = stacks([process.pid, *below(process.pid)])
            for pid in below(process.pid):  # also those that lead groups of their own, and may hold the pipes
                _kill(pid)
            kill_group(process)
            output, errors = process.communicate(timeout=20)
            said = f"{process.args!r} did not end within {limit:g} s\n{where}\n{output}\n{errors}"
            raise AssertionError(said) from None
        kill_group(process)
    assert not check or process.returncode == 0, f"{process.args!r}: {process.returncode}\n{output}\n{errors}"
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def kill_group(process: "subprocess.Popen[Any]") -> None:
    """Kill the process group that a process leads, if there is anything left of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def below(pid: int) -> list[int]:
    """Return the processes that descend from a process, parents first."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                children[int(parent)].append(int(entry.name))
    found = list(children[pid])
    for each in found:  # grows while it is read
        found += children[each]
    return found


def stacks(pids: Sequence[int]) -> str:
    """Return the command line of each process and, where it is Python, the stacks of its threads."""
    return "\n".join(_stack(pid) for pid in pids)


def _stack(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return f"== {pid} has ended"
    spy = next((path for path in _SPY if path.is_file()), None) or shutil.which("py-spy")
    if spy is None or "python" not in command.partition(" ")[0]:
        return f"== {pid}: {command[:200]}"
    dump = [str(spy), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(dump, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return f"== {pid}: {command[:200]}\nno stacks within 20 s"
    return f"== {pid}: {command[:200]}\n{done.stdout or done.stderr}"
