"""Files and folders that are there whole or not at all: written next to their place, synced if asked, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

P = TypeVar("P", bound=Path)


@contextlib.contextmanager
def appearing(path: P, *, sync: bool = False) -> Iterator[P]:
    """Yield a path next to `path` to write to; rename it to `path` at the end, or delete it if anything is raised.

    Args:
        path: The file or folder to make. A file that is there is replaced.
        sync: Whether it outlives a power failure once it has its name.

    Yields:
        A path in the same folder, hidden, with the suffix `.partial`. Nothing lies there yet.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        if sync:
            sync_to_disk(file for file in [partial, *partial.rglob("*")] if file.is_file())
        partial.replace(path)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise
    if sync:
        sync_to_disk([path])  # its name in the folder, too


def sync_to_disk(files: Iterable[Path]) -> None:
    """Call fsync on files and on their folders; those that do not exist are skipped."""
    files = list(files)
    for path in [*files, *sorted({file.parent for file in files})]:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
