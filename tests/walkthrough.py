"""Follow a page of the documentation as a reader would: save its files, type its commands, run its Python, in order.

A fenced block whose first line is a comment with a file name (`# job.yaml`) is saved under that name. A `python` block
otherwise runs in one session with the others of the page; a `text` block right after it is what it prints. A `console`
block holds commands after `$ ` with what they print; `…` stands for lines of any number, `^C` is where the reader
presses Ctrl-C. Other blocks (`bash`) are not followed.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

READER = "/home/you/digits"  # the reader's folder, as the page calls it
PATIENCE = 300.0
READY = re.compile("look at test data: |http://")  # what a command says when it is worth an interruption

_BLOCK = re.compile(r"^```(python|yaml|console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w.]+\.\w+)\n")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")

# what differs from machine to machine or from run to run
_VARIES = (
    (r"\d[\d.]*(e[+-]\d+)? (s|ms|min|h|bytes|KiB|MiB|GiB)\b", r"_ \2"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "DATE"),
    (r"\b[0-9a-f]{16}…", "SHA…"),
    (r"\b\d+\.\d+\.\d+(\+\w+)?", "VERSION"),
    (r"(http://[^:]+:)\d+\S*", r"\1PORT"),
    (r" +", " "),
)


@dataclass(frozen=True)
class Step:
    """What was done, what the page shows of it (None: nothing, it may print what it likes), and what came."""

    done: str
    shown: str | None
    came: str

    @property
    def agrees(self) -> bool:
        """Whether what came is what is shown, but for what varies."""
        return self.shown is None or same(self.shown, self.came)


def same(shown: str, came: str) -> bool:
    """The same words, whole numbers and decimals to 1 %; rounding errors to the same few orders of magnitude."""
    shown, came = _settled(shown), _settled(came)
    if "…\n" in shown:
        came, shown = came[-len(shown.partition("…\n")[2]) :], shown.partition("…\n")[2]
    if _NUMBER.sub("#", shown) != _NUMBER.sub("#", came):
        return False
    return all(_near(a, b) for a, b in zip(_NUMBER.findall(shown), _NUMBER.findall(came), strict=True))


def _settled(text: str) -> str:
    for pattern, replacement in _VARIES:
        text = re.sub(pattern, replacement, text)
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _near(shown: str, came: str) -> bool:
    if re.fullmatch(r"-?\d+", shown):
        return shown == came
    a, b = float(shown), float(came)
    rounding = abs(a) < 1e-5 and abs(b) < 1e-5
    return rounding or abs(a - b) <= 0.01 * max(abs(a), abs(b))


def follow(page: Path, folder: Path) -> Iterator[Step]:
    """Do what the page says in the folder, which becomes the current one meanwhile."""
    session: dict[str, object] = {"__name__": "__main__"}
    blocks = [(match[1], match[2], match.end()) for match in _BLOCK.finditer(page.read_text())]
    text = page.read_text()
    with contextlib.chdir(folder):
        for position, (kind, content, end) in enumerate(blocks):
            name = _FILE.match(content)
            if kind != "console" and name:
                Path(name[1]).write_text(content)
            elif kind == "console":
                yield from _commands(content, folder)
            elif kind == "python":
                following = blocks[position + 1] if position + 1 < len(blocks) else ("", "", 0)
                joined = following[0] == "text" and text[end:].lstrip().startswith("```text")
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(content, f"{page.name}, block {position}", "exec"), session)
                yield Step(content, following[1] if joined else None, printed.getvalue())


def _commands(content: str, folder: Path) -> Iterator[Step]:
    for part in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        if "^C\n" in shown:
            came = _interrupted(command)
            shown = shown.replace("^C\n", "")
        else:
            came = _finished(command)
        yield Step(command, shown, came.replace(str(folder.resolve()), READER))


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "XDG_STATE_HOME": str(Path.cwd() / ".state")}  # not the tester's own


def _finished(command: str) -> str:
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=_environment(), timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, f"`{command}` ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def _interrupted(command: str) -> str:
    """What it says up to its end, with Ctrl-C as soon as it is READY."""
    process = subprocess.Popen(
        f"exec {command}",
        shell=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment() | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    came = ""
    patience = threading.Timer(PATIENCE, process.kill)
    patience.daemon = True
    patience.start()
    with process:
        for line in process.stdout:
            came += line
            if READY.search(line):
                process.send_signal(signal.SIGINT)
    assert patience.is_alive(), f"`{command}` had not ended after {PATIENCE:.0f} s:\n{came}"
    patience.cancel()
    return came
