"""Results that lie elsewhere: behind any URL that fsspec knows, such as s3://, gs://, https:// or memory://.

Object stores put a file there whole or not at all and have nothing to rename, to lock or to sync: what is written is
there when the call returns.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from typing import Any

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore

from distinfluence.errors import MissingDependencyError, StoreError


class RemoteFolder(os.PathLike[str]):
    """The folder of a result behind a URL. name: its last part."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def store(self, *, read_only: bool = True) -> RemoteStore:
        """Return the zarr store behind the URL."""
        store = RemoteStore.from_url(self.url, read_only=read_only)
        assert isinstance(store, RemoteStore)
        return store

    def writable_store(self) -> RemoteStore:
        """Return what zarr writes to."""
        return self.store(read_only=False)

    def read_file(self, key: str) -> bytes | None:
        """Return a file of the folder, or None if there is none.

        Raises:
            StoreError: The server does not answer.
        """
        filesystem, root = self._place
        try:
            content: bytes = filesystem.cat_file(f"{root}/{key}")
        except FileNotFoundError:
            return None
        except Exception as error:  # every file system has errors of its own
            raise StoreError(f"cannot read `path` {self.url}: {error}. Check the URL and your access.") from error
        return content

    def has(self, key: str) -> bool:
        """Return whether a file of the folder is there."""
        filesystem, root = self._place
        filesystem.invalidate_cache()  # other processes write, too
        return bool(filesystem.isfile(f"{root}/{key}"))

    def names(self) -> list[str]:
        """Return the names of what lies in the folder, sorted; empty if there is no folder."""
        filesystem, root = self._place
        filesystem.invalidate_cache()
        try:
            return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in filesystem.ls(root, detail=False))
        except FileNotFoundError:
            return []

    def is_used(self) -> bool:
        """Return whether anything is there."""
        return bool(self.names())

    def looks_like(self) -> str:
        """Say what is there, where it is not a result of ours."""
        return f"a URL with {', '.join(self.names()[:3])}"

    def delete(self, keys: Iterable[str]) -> None:
        """Delete files or folders in it, or all of it (an empty key); those that are not there are skipped."""
        filesystem, root = self._place
        filesystem.invalidate_cache()
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                filesystem.rm(f"{root}/{key}".rstrip("/"), recursive=True)

    def settle(self, keys: Iterable[str]) -> None:
        """Do nothing: what is written outlives a power failure."""

    @contextlib.contextmanager
    def replaced(self) -> Iterator[RemoteFolder]:
        """Delete the folder, and yield it to be built again."""
        self.delete([""])
        yield self

    def sweep(self) -> None:
        """Do nothing: killed writers leave no unfinished files."""

    @functools.cached_property
    def _place(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            filesystem, root = url_to_fs(self.url)
        except ImportError as error:
            raise MissingDependencyError(f"`path` {self.url} needs another package: {error}. Install it.") from error
        except ValueError as error:
            raise StoreError(f"`path` {self.url} cannot be opened: {error}. Pass a URL that fsspec knows.") from error
        return filesystem, str(root).rstrip("/")


class RemoteStore(FsspecStore):
    """Reads from a URL and counts. `bytes_read`: since it was opened, metadata included."""

    bytes_read = 0

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """As the store's own, counted."""
        buffer = await super().get(key, prototype, byte_range)
        self.bytes_read += 0 if buffer is None else len(buffer)
        return buffer
