"""Files of the scratch folder: there whole or not at all, and every failure to write them says what to free.

Files that a resumed run relies on are synced and carry checksums; those that live as long as one run are neither.
"""

import fcntl
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import dask
import numpy as np
from dask.utils import format_bytes

from distinfluence.atomic import appearing
from distinfluence.errors import DiskFullError, StoreError
from distinfluence.influence.arrays import Array
from distinfluence.store.format.folder import FULL


@contextmanager
def scratch_errors(folder: Path, what: str) -> Iterator[None]:
    """Raise what the operating system says as StoreError; DiskFullError where nothing can be written any more.

    A RuntimeError counts, too: torch raises no other error when a disk is full.

    Args:
        folder: The scratch folder.
        what: What is written, for the message.

    Raises:
        StoreError: The operating system raised an error.
        DiskFullError: The disk is full.
    """
    try:
        yield
    except StoreError:
        raise
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        full = number in FULL or (number is None and shutil.disk_usage(folder).free < 2**20)
        kind = DiskFullError if full else StoreError
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        raise kind(
            f"`scratch` {folder}: cannot write {what} ({reason}). Free space or pass another `scratch`, then resume."
        ) from error


def save_whole(path: Path, array: Array, *, sync: bool = False) -> None:
    """Write a .npy file under another name first, so that it is there whole or not at all.

    Args:
        path: The file.
        array: The array.
        sync: Whether that must hold after a power failure, too.

    Raises:
        StoreError: The file cannot be written.
    """
    what = f"{format_bytes(array.nbytes)} to {path.name}"
    with scratch_errors(path.parent, what), appearing(path, sync=sync) as partial, partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)


_HOST = socket.gethostname().encode()


RUN_PREFIX = "run-"  # of the folders of single runs in a scratch folder


class Scratch:
    """Folders for a run's files. kept: the one that was named, for what a later run may take; folder: for the rest.

    `folder` goes, whole, when nothing on this side refers to it: a folder of its own in the named one, or a temporary
    one, which is `kept`, too, if none was named. Contexts hold on to it, so that lazy arrays outlive the calculator
    that made them. It does not travel. Those of runs of this host that were killed go when its next run comes: their
    lock is free. Of another host's that cannot be known, as some shared file systems keep locks to the host.
    """

    def __init__(self, named: str | Path | None) -> None:
        self.temporary = named is None
        if named is not None:
            self.kept = Path(named).expanduser().resolve()
            try:
                self.kept.mkdir(parents=True, exist_ok=True)
                _remove_left(self.kept)
                self.folder = Path(tempfile.mkdtemp(prefix=RUN_PREFIX, dir=self.kept))
                self.folder.chmod(self.kept.stat().st_mode & 0o777)  # workers may be another user's
            except OSError as error:
                raise StoreError(
                    f"`scratch` {self.kept} cannot be made: {error.strerror}. Pass a folder that can, or an output "
                    "beside which it can."
                ) from error
        else:
            self.folder = self.kept = Path(
                tempfile.mkdtemp(prefix="distinfluence-", dir=dask.config.get("temporary-directory", None))
            )
        weakref.finalize(self, _removed, self.folder, _held(self.folder))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _held(folder: Path) -> IO[bytes]:
    """Lock a run's folder until its holder dies. The lock's file names the host once it holds."""
    lock = (folder / "lock").open("wb", buffering=0)
    with suppress(OSError):  # a file system without locks: what is left there stays until somebody removes it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.write(_HOST)
    return lock


def _removed(folder: Path, lock: IO[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _remove_left(scratch: Path) -> None:
    """Remove the folders of this host's runs whose process is gone."""
    for folder in scratch.glob(f"{RUN_PREFIX}*"):
        with suppress(OSError), (folder / "lock").open("rb+") as lock:  # none yet: it is just being made
            if lock.read() == _HOST:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
