"""What every worker did, as lines of JSON in a file of its own: readable while the run goes on, and after it died."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed import Worker, WorkerPlugin

from distinfluence.memory import process_bytes
from distinfluence.store.format.folder import surfaced_errors

LOGGER = logging.getLogger("distinfluence.worker")


class JsonLines(logging.Formatter):
    """One JSON object a line: time (seconds since 1970), host, pid, level, message, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        own = {"time": round(record.created, 3), "host": socket.gethostname(), "pid": os.getpid()}
        own |= {"level": record.levelname, "message": record.getMessage()}
        fields = getattr(record, "fields", {})
        failure = {"error": str(record.exc_info[1])} if record.exc_info else {}
        return json.dumps(own | fields | failure)


class LogToFolder(WorkerPlugin):
    """Have each worker write its tasks to `worker-<host>-<pid>.jsonl` in a folder.

    Args:
        folder: The folder, as the workers see it.
    """

    name = "distinfluence-log-to-folder"

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self._handler: logging.Handler | None = None

    def setup(self, worker: Worker) -> None:
        """Open the file.

        Args:
            worker: The worker whose tasks are written.
        """
        with surfaced_errors("write logs to", Path(self.folder)):
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        file = Path(self.folder) / f"worker-{socket.gethostname()}-{os.getpid()}.jsonl"
        self._handler = logging.FileHandler(file, delay=True)
        self._handler.setFormatter(JsonLines())
        LOGGER.addHandler(self._handler)
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False
        LOGGER.info("joined", extra={"fields": {"address": worker.address, "memory": process_bytes()}})

    def teardown(self, worker: Worker) -> None:
        """Close the file.

        Args:
            worker: The worker whose tasks were written.
        """
        if self._handler is not None:
            LOGGER.info("left", extra={"fields": {"address": worker.address}})
            LOGGER.removeHandler(self._handler)
            self._handler.close()
            self._handler = None


@contextmanager
def logged_task(name: str, **fields: object) -> Iterator[None]:
    """Log a line when the task ends, with its seconds and the process's memory; or with the error if it fails."""
    if not LOGGER.isEnabledFor(logging.INFO):
        yield
        return
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        LOGGER.exception(name, extra={"fields": {**fields, "seconds": round(time.perf_counter() - start, 4)}})
        raise
    done = {**fields, "seconds": round(time.perf_counter() - start, 4), "memory": process_bytes()}
    LOGGER.info(name, extra={"fields": done})
