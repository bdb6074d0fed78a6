"""Files of the scratch folder: there whole or not at all, and every failure to write them says what to free.

Files that a resumed run relies on are synced and carry checksums; those that live as long as one run are neither.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from distinfluence.errors import DiskFullError, StoreError
from distinfluence.influence.arrays import Array
from distinfluence.scaling.plan.plan import Plan
from distinfluence.store.format.folder import FULL, sync_to_disk


@contextmanager
def scratch_errors(folder: Path, what: str) -> Iterator[None]:
    """Raise what the operating system says as StoreError; DiskFullError where nothing can be written any more.

    what: is written, for the message. A RuntimeError counts too: torch has no other for a disk that is full.
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

    sync: also after the power failed. Raises StoreError.
    """
    with scratch_errors(path.parent, f"{_size(array.nbytes)} to {path.name}"), appearing(path) as partial:
        with partial.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        if sync:
            sync_to_disk([partial])
    if sync:
        with scratch_errors(path.parent, path.name):
            sync_to_disk([path])  # its name in the folder, too


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A file to be written under another name, which becomes `path` at the end, or goes if that is not reached."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def require_space(plan: Plan, output: Path | None, scratch: Path, share_of_result: float = 1.0) -> None:
    """Pass if the disks have room for what the plan will write. Raises DiskFullError, saying how much to free.

    output: where the result will be, None if that is no folder; what lies there counts as room: a run that goes on
    has written it already, one that overwrites deletes it. So do factors and fits in `scratch`. share_of_result: of
    the plan's bytes, below 1 where values are rounded and compressed.
    """
    needed: dict[int, list[tuple[str, Path, int, int]]] = {}
    places = [("scratch", scratch, plan.scratch_bytes)]
    if output is not None:
        places.insert(0, ("output", output, int(share_of_result * plan.disk_bytes)))
    for name, folder, nbytes in places:
        disk = _existing(folder)
        needed.setdefault(disk.stat().st_dev, []).append((name, disk, nbytes, bytes_in(folder)))
    for uses in needed.values():
        free = shutil.disk_usage(uses[0][1]).free
        missing = sum(max(0, nbytes - there) for _, _, nbytes, there in uses) - free
        if missing > 0:
            listed = " and ".join(f"{_size(nbytes)} for `{name}`" for name, _, nbytes, _ in uses)
            raise DiskFullError(
                f"the run needs {listed} on the disk of {uses[0][1]}, which has {_size(free)} free. Free "
                f"{_size(missing)}, put `output` or `scratch` on another disk, or store fewer `mantissa_bits`."
            )


def bytes_in(folder: Path) -> int:
    """Bytes that the files in a folder take on the disk; holes in them take none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_blocks * 512
            except OSError:  # gone meanwhile
                continue
    return total


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _size(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
