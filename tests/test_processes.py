"""Nothing that a test or a step starts can wait for ever, and what runs out of time says where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT, below, finished, started
from tests.steps import Ended, Step, run, table

# A process that starts another one; both sleep in functions that are known by name.
SLEEPERS = """
import subprocess, sys, time
child = "import time\\ndef dozes(): time.sleep(600)\\nprint('up', flush=True)\\ndozes()"
def waits(): subprocess.run([sys.executable, "-c", child])
waits()
"""


def test_a_command_is_run_with_what_it_is_given_and_gives_what_it_wrote() -> None:
    done = finished(["cat"], given="a line\n", check=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a line\n", "")
    with pytest.raises(AssertionError, match=r"3\n.*\nno"):
        finished(["sh", "-c", "echo no >&2; exit 3"], check=True)
    assert finished(["sh", "-c", "exit 3"]).returncode == 3


def test_what_a_command_leaves_running_ends_with_the_block() -> None:
    with started([sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        (child,) = below(process.pid)
    assert process.poll() is not None
    wait_until_gone("dozes", child)


def test_a_command_that_does_not_end_shows_the_stacks_of_all_its_processes() -> None:
    with pytest.raises(AssertionError, match="did not end within 3 s") as caught:
        finished([sys.executable, "-c", SLEEPERS], limit=3)
    assert "waits" in str(caught.value) and "dozes" in str(caught.value)


def test_a_test_that_sleeps_for_ever_ends_with_its_stack_and_those_of_its_processes(tmp_path: Path) -> None:
    source = f"import subprocess, sys\ndef test_stuck(): subprocess.run([sys.executable, '-c', {SLEEPERS!r}])\n"
    (tmp_path / "test_stuck.py").write_text(source)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntimeout = 3\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "tests.timeouts", "-p", "no:cacheprovider", "-q", tmp_path]
    done = finished(command, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert "Timeout (>3.0s)" in done.stdout
    assert all(name in done.stdout for name in ("test_stuck.py:2:", "waits (<string>", "dozes (<string>"))


def test_steps_run_side_by_side_and_those_after_a_failure_do_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def meets(own: str, other: str) -> tuple[str, ...]:
        """A command that ends when another one like it runs at the same time."""
        return "sh", "-c", f"cd {tmp_path}; touch {own}; until [ -e {other} ]; do sleep 0.05; done; echo {own} met"

    steps = (
        Step("last", ("echo", "never"), 60, ("bad",)),
        Step("first", meets("one", "two"), 60),
        Step("second", meets("two", "one"), 60),
        Step("bad", ("sh", "-c", "echo oh; exit 3"), 30, ("first",)),
        Step("behind", ("true",), 30, (), ("bad",)),
    )
    ended = run(steps)
    assert {name: step.how for name, step in ended.items()} == {
        "first": "passed",
        "second": "passed",
        "bad": "failed with status 3",
        "last": "not run",
        "behind": "passed",
    }
    shown = capfd.readouterr().out
    assert "=== first passed" in shown and "\none met\n" in shown and "\noh\n" in shown and "never\n" not in shown


def test_a_step_that_does_not_end_is_ended_with_all_stacks(capfd: pytest.CaptureFixture[str]) -> None:
    ended = run((Step("stuck", (sys.executable, "-c", SLEEPERS), 3),))
    assert ended["stuck"].how == "did not end within 3 s"
    shown = capfd.readouterr().out
    assert "waits (<string>" in shown and "dozes (<string>" in shown
    wait_until_gone("dozes", *below(os.getpid()))


def test_a_preloaded_python_is_called_like_any_other(python: Path, tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv, sys.stdin.read(), os.getcwd(), 'torch' in sys.modules); sys.exit(3)"
    done = finished([python, "-c", code, "a"], given="b", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, f"['-c', 'a'] b {tmp_path} True\n")
    done = finished([python, "-c", "raise ValueError('oh')"])
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ValueError: oh")
    real = finished([python, "-I", "-c", "import sys; print('torch' in sys.modules)"], check=True)
    assert real.stdout == "False\n"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_preloaded_process_ends_with_its_client(python: Path, sent: signal.Signals) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with started([python, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        fork = Path("/proc") / process.stdout.readline().strip()
        process.send_signal(sent)
        assert process.wait(timeout=30) == -sent
    end = time.monotonic() + 30
    while fork.exists():
        assert time.monotonic() < end, "the fork lives on"
        time.sleep(0.05)


def wait_until_gone(name: str, *pids: int) -> None:
    """Wait until none of the processes has the name in its command line: one that is killed takes a moment to end."""

    def command(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return ""

    end = time.monotonic() + 30
    while any(name in command(pid) for pid in pids):
        assert time.monotonic() < end, f"{name} lives on"
        time.sleep(0.05)


def test_the_table_has_a_line_for_each_step() -> None:
    text = table({"test": Ended("passed", 61.2, 100.4), "docs": Ended("not run")}, 70.0)
    assert [line.split() for line in text.splitlines()] == [
        ["test", "61", "s", "100", "s", "of", "CPU", "passed"],
        ["docs", "0", "s", "0", "s", "of", "CPU", "not", "run"],
        ["all", "70", "s", "100", "s", "of", "CPU"],
    ]
