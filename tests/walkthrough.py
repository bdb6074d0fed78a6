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

if __package__:
    from tests.processes import finished, kill_group, started
else:  # tests/first_minutes.py has only this folder on the path: the one above would hide the installed package
    from processes import finished, kill_group, started  # type: ignore[import-not-found, no-redef]

READER = "/home/you/digits"  # the reader's folder, as the page calls it
PATIENCE = 300.0
READY = re.compile("look at training data: |http://")  # what a command says when it is worth an interruption

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
            came = _printed(command)
        yield Step(command, shown, came.replace(str(folder.resolve()), READER))


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "XDG_STATE_HOME": str(Path.cwd() / ".state")}  # not the tester's own


def _printed(command: str) -> str:
    return finished(["/bin/sh", "-c", command], limit=PATIENCE, env=_environment(), check=True).stdout


def _interrupted(command: str) -> str:
    """What it says up to its end, with Ctrl-C as soon as it is READY."""
    came = ""
    environment = _environment() | {"PYTHONUNBUFFERED": "1"}
    line = ["/bin/sh", "-c", f"exec {command}"]
    with started(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        assert process.stdout is not None
        patience = threading.Timer(PATIENCE, kill_group, [process])
        patience.daemon = True
        patience.start()
        for text in process.stdout:
            came += text
            if READY.search(text):
                process.send_signal(signal.SIGINT)
        process.wait()
    assert patience.is_alive(), f"`{command}` had not ended after {PATIENCE:.0f} s:\n{came}"
    patience.cancel()
    return came
