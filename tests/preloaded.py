"""A `python` whose processes have imported torch, Dask and this package already: each is forked from one that has.

A fresh interpreter takes five seconds of CPU before its first derivative, and a run over batch jobs starts a dozen. The
program at `Preloaded.python` is called like `python`. It hands its arguments, environment, folder and open files to a
server, which forks; it passes signals on, ends as the fork ends, and takes the fork along when it is killed. So shells,
SLURM and tests deal with a process of their own, and `sys.executable` is this program again. With options other than
`-m` and `-c` it becomes the real interpreter. Linux only.
"""

import atexit
import contextlib
import fcntl
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPARE = 400  # File descriptors from here on are free in every process.

CLIENT = """#!{real} -IS
import json, os, signal, socket, sys
given = sys.argv[1:]
server = socket.socket(socket.AF_UNIX)
try:
    if not given or (given[0].startswith("-") and given[0] not in ("-m", "-c")):
        raise OSError
    server.connect({address!r})
except OSError:
    os.execv({real!r}, [{real!r}, *given])
passed, ignored = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2], []
for each in passed:
    if signal.getsignal(each) is signal.SIG_IGN:
        ignored.append(each)
files = []
for name in os.listdir("/proc/self/fd"):
    try:
        os.fstat(int(name))
    except OSError:
        continue
    if int(name) != server.fileno():
        files.append(int(name))
request = json.dumps({{
    "arguments": given, "environment": dict(os.environ), "folder": os.getcwd(), "files": files, "ignored": ignored,
    "cores": list(os.sched_getaffinity(0)),
}}).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], files)
server.sendall(request)
for each in passed:
    if each not in ignored:
        signal.signal(each, lambda number, _: server.send(bytes([number])))
answer = server.recv(4)
status = int.from_bytes(answer, "big", signed=True) if answer else 255
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class Preloaded:
    """The server, from its construction until `stop`. environment: of the server alone."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="di-python-", dir="/tmp"))  # sockets have room for a hundred letters
        address = str(self.folder / "socket")
        self.python = self.folder / "python"
        self.python.write_text(CLIENT.format(real=sys.executable, address=address))
        self.python.chmod(0o755)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded", address, str(self.python)],
            cwd=Path(__file__).parents[1],
            env={**environment, "OMP_NUM_THREADS": "1"},  # no thread before a fork
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == b"ready\n"

    def stop(self) -> None:
        """End the server and whatever it has forked."""
        with self._server:
            self._server.communicate()
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()


class _Server:
    """Forks a process for each connection, until its standard input is closed."""

    def __init__(self, address: str, python: str) -> None:
        self._python = python
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._forks: dict[int, tuple[int, socket.socket]] = {}  # pidfd → process, connection

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fd == sys.stdin.fileno():
                    for pid, _ in self._forks.values():
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fd == self._listener.fileno():
                    self._fork(self._listener.accept()[0])
                elif key.fd in self._forks:
                    self._ended(key.fd)
                elif isinstance(key.fileobj, socket.socket):
                    self._told(key.fileobj, key.data)

    def _fork(self, connection: socket.socket) -> None:
        header, files, _, _ = socket.recv_fds(connection, 4, 250)
        size, request = int.from_bytes(header, "big"), b""
        while header and len(request) < size and (part := connection.recv(size - len(request))):
            request += part
        if not header or len(request) < size:  # it was killed at once
            connection.close()
        elif pid := os.fork():
            watched = os.pidfd_open(pid)
            self._forks[watched] = pid, connection
            self._selector.register(watched, selectors.EVENT_READ)
            self._selector.register(connection, selectors.EVENT_READ, watched)
        else:
            _become(json.loads(request), files, self._python)
        for file in files:
            os.close(file)

    def _told(self, connection: socket.socket, watched: int) -> None:
        """Pass signals on; a client that has gone takes its fork along."""
        with contextlib.suppress(ConnectionError):
            for number in connection.recv(64):
                os.kill(self._forks[watched][0], number)
                return
        self._selector.unregister(connection)
        os.kill(self._forks[watched][0], signal.SIGKILL)

    def _ended(self, watched: int) -> None:
        pid, connection = self._forks.pop(watched)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            connection.sendall(status.to_bytes(4, "big", signed=True))
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)
        self._selector.unregister(watched)
        os.close(watched)
        connection.close()


def _become(request: dict[str, Any], files: list[int], python: str) -> None:
    """Be what the client asked for, and end."""
    status = 1
    try:
        os.setsid()
        moved = [fcntl.fcntl(file, fcntl.F_DUPFD, SPARE) for file in files]
        os.closerange(0, SPARE)
        for file, number in zip(moved, request["files"], strict=True):
            os.dup2(file, number)
            os.close(file)
        for number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        os.sched_setaffinity(0, request["cores"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        _settle(request["arguments"], python, len(request["cores"]))
        status = _run(request["arguments"])
    finally:
        os._exit(status)


def _settle(arguments: list[str], python: str, cores: int) -> None:
    """Make this process look new to Python, multiprocessing, torch and Dask."""
    import multiprocessing

    import dask
    import torch

    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        errors = "strict" if number == 1 else "backslashreplace"
        stream = open(number, "w", errors=errors, closefd=False)  # noqa: SIM115
        stream.reconfigure(line_buffering=number == 2 or stream.isatty(), write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.executable = python
    multiprocessing.set_executable(python)
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = [arguments[0], *arguments[2:]] if arguments[0] in ("-m", "-c") else arguments
    sys.path[0] = str(Path(arguments[0]).parent) if arguments[0] not in ("-m", "-c") else os.getcwd()
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in given if path and path not in sys.path]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores)))
    dask.config.refresh()


def _run(arguments: list[str]) -> int:
    """The status with which an interpreter would end."""
    try:
        try:
            if arguments[0] == "-m":
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            elif arguments[0] == "-c":
                exec(compile(arguments[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
            else:
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            return _status(end.code)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _status(code: object) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)  # noqa: T201
    return 1


def main() -> None:
    """The server, by the address of its socket and the path of the program that calls it."""
    importlib.import_module("tests.imported")
    server = _Server(*sys.argv[1:])
    os.write(1, b"ready\n")
    server.run()


if __name__ == "__main__":
    main()
