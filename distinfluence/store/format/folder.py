"""What lies at a path: nothing, a result of ours, or something foreign that must not be touched.

The only file that creates, replaces and deletes folders. A result appears whole (built next to its place, then renamed)
and only what distinfluence wrote is ever deleted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PosixPath
from typing import Any

import zarr

from distinfluence.atomic import appearing, sync_to_disk
from distinfluence.errors import (
    CorruptStoreError,
    DiskFullError,
    ForeignStoreError,
    SettingError,
    StoreError,
    StoreExistsError,
    StoreNotFoundError,
)
from distinfluence.store.format.remote import RemoteFolder

FORMAT = "distinfluence"
FORMAT_VERSION = 1
RUNNING, COMPLETE = "running", "complete"  # states of a result

_OWN_ENTRIES = frozenset(
    {
        "zarr.json",
        "influences",
        "test_loss",
        "test_gradient_norm",
        "relative_residual",
        "iterations",
        "converged",
        "error_bound",
        "train_loss",
        "train_gradient_norm",
        "train_total",
        "self_influence",
        "self_influence_error",
        "strip_status",
        "top_index",
        "top_value",
        "bottom_index",
        "bottom_value",
        "strips",
        "overview",
        "contributions",
        "samples",
    }
)
_STALE_SECONDS = 900.0
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # nobody can write any more; others may pass
RESUME = "run again with `resume`; strips that are marked are kept."
_ATTRIBUTES_BYTES = 2**26  # of attributes and consolidated metadata, at most


class LocalFolder(PosixPath):
    """The folder of a result on a file system of this host. It answers the same questions as `RemoteFolder`."""

    def writable_store(self) -> str:
        """Return what zarr writes to."""
        return str(self)

    def read_file(self, key: str) -> bytes | None:
        """Return a file of the folder, or None if there is none.

        Raises:
            CorruptStoreError: The file is too large to be ours: it may be all holes.
        """
        file = self / key
        if not file.is_file():
            return None
        if file.stat().st_size > _ATTRIBUTES_BYTES:
            raise CorruptStoreError(
                f"`{key}` of {self} has {file.stat().st_size} bytes, expected at most {_ATTRIBUTES_BYTES}. Pass "
                "another path."
            )
        return file.read_bytes()

    def has(self, key: str) -> bool:
        """Return whether a file of the folder is there."""
        return (self / key).is_file()

    def names(self) -> list[str]:
        """Return the names of what lies in the folder, sorted."""
        return sorted(entry.name for entry in self.iterdir())

    def is_used(self) -> bool:
        """Return whether anything is there, other than an empty folder."""
        return self.exists() and not (self.is_dir() and not self.names())

    def looks_like(self) -> str:
        """Say what is there, where it is not a result of ours."""
        if not self.is_dir():
            return "a file"
        if any((self / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
            return "another zarr store"
        names = self.names()
        return f"a folder with {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else "an empty folder"

    def delete(self, keys: Iterable[str]) -> None:
        """Delete files or folders in it; those that are not there are skipped."""
        for key in keys:
            if (self / key).is_dir():
                shutil.rmtree(self / key, ignore_errors=True)
            else:
                (self / key).unlink(missing_ok=True)

    def settle(self, keys: Iterable[str]) -> None:
        """Make files in it outlive a power failure: zarr renames files but never syncs them."""
        sync_to_disk(self / key for key in keys)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[LocalFolder]:
        """Yield a path beside this one to build a folder at, which takes its place at the end."""
        old = self.with_name(f".{self.name}.{uuid.uuid4().hex}.old")
        self.parent.mkdir(parents=True, exist_ok=True)
        try:
            with appearing(self) as new:
                yield new
                if self.is_used():
                    self.rename(old)
        except BaseException:
            if old.exists() and not self.exists():
                old.rename(self)
            raise
        if old.exists():
            shutil.rmtree(old)

    def sweep(self) -> None:
        """Delete the `.partial` files of killed writers that nobody has written to for 15 minutes."""
        for file in self.rglob("*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                    file.unlink()


Location = LocalFolder | RemoteFolder


def is_local_url(path: str | os.PathLike[str]) -> bool:
    """Whether it is the URL of a folder of this host's file systems."""
    return str(path).startswith(("file://", "local://"))


def local_path(path: str | os.PathLike[str]) -> LocalFolder:
    """Return `path` made absolute, links resolved; a `file://` URL is accepted, too.

    Raises:
        SettingError: `path` is another URL, empty, or not a path.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise SettingError(f"`path` must be a str or Path, got {path!r}. Pass the folder of the result.")
    if is_local_url(path):
        path = str(path).partition("://")[2]
    if "://" in str(path):
        raise SettingError(
            f"`path` must be a folder of this host or a shared file system, got {str(path)!r}. Copy the result here."
        )
    with surfaced_errors("resolve", Path(path)):
        return LocalFolder(path).expanduser().resolve()


def place_of(path: str | os.PathLike[str]) -> Location:
    """Return where a result is read from: a URL as it is, a path made absolute.

    Raises:
        SettingError: `path` is empty or not a path.
    """
    remote = "://" in str(path) and not is_local_url(path)
    return RemoteFolder(str(path)) if remote else local_path(path)


def read_attributes(path: Location) -> dict[str, Any]:
    """Return the attributes of our result at `path`.

    Raises:
        StoreNotFoundError: There is no result at `path`.
        ForeignStoreError: `path` holds something that distinfluence did not write.
        StoreError: The result was written by a newer version.
    """
    with surfaced_errors("read", path):
        attributes = _our_attributes(path)
        if attributes is None and (isinstance(path, RemoteFolder) or not path.exists()):
            raise StoreNotFoundError(f"`path` {path} does not exist, expected a result. Check it for typing errors.")
    if attributes is None:
        raise ForeignStoreError(
            f"`path` {path} is not a result of distinfluence: {path.looks_like()}. Pass another path."
        )
    version = attributes.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(
            f"`path` {path} has format version {version!r}, this distinfluence reads up to {FORMAT_VERSION}. "
            "Install a newer distinfluence."
        )
    return attributes


def require_free(path: Location, overwrite: bool) -> None:
    """Pass if a result may be put at `path`: nothing or an empty folder is there, or a result of ours and `overwrite`.

    Nothing is touched.

    Raises:
        ForeignStoreError: `path` holds something that distinfluence did not write.
        StoreExistsError: `path` holds a result, and `overwrite` is false.
    """
    with surfaced_errors("read", path):
        if not path.is_used():
            return
        if _our_attributes(path) is None:
            raise ForeignStoreError(
                f"`path` {path} holds something that distinfluence did not write ({path.looks_like()}); nothing was "
                "touched. Pass another path."
            )
        if not overwrite:
            raise StoreExistsError(
                f"`path` {path} holds a result already. Pass existing='resume' (--resume) to continue it, or "
                "existing='replace' (--overwrite) to delete it."
            )
        strangers = sorted(set(path.names()) - _OWN_ENTRIES)
    if strangers:
        raise ForeignStoreError(
            f"`path` {path} holds a result, but also {', '.join(strangers[:5])}, which distinfluence did not write; "
            "nothing was touched. Move that away, or pass another path."
        )


@contextlib.contextmanager
def put_in_place(path: Location, overwrite: bool) -> Iterator[Location]:
    """Yield where to build a result, which is at `path` at the end: whole, or not at all.

    With `overwrite`, a result of ours at `path` is deleted after the new one is built. Behind a URL nothing can be
    renamed: it is deleted first, and the new one built in its place.
    """
    require_free(path, overwrite)
    with surfaced_errors("create", path), path.replaced() as new:
        yield new
        if new is not path:  # another process may have been faster
            require_free(path, overwrite)


def consolidate(path: Location) -> None:
    """Copy the metadata of all arrays of a complete result to the group's own, so that readers need one look."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # consolidated metadata is no part of the v3 specification, yet
        zarr.consolidate_metadata(path.writable_store())


@contextlib.contextmanager
def surfaced_errors(action: str, path: Path | RemoteFolder, resume: str = RESUME) -> Iterator[None]:
    """Raise what the operating system and zarr's checksums say as StoreError with path and remedy.

    resume: how to go on once there is space again.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        surfaced = (DiskFullError if error.errno in FULL else StoreError)(
            f"cannot {action} `path` {path}: {error.strerror or error}. Free space or correct the permissions, then "
            f"{resume}"
        )
        surfaced.errno = error.errno
        raise surfaced from error
    except ValueError as error:
        if "checksum" not in str(error).lower():
            raise
        raise CorruptStoreError(
            f"`path` {path} is damaged: {error}. `damaged_strips` of the result lists what to compute again."
        ) from error
    except Exception as error:
        known = type(error).__module__.partition(".")[0] in ("builtins", "distinfluence", "numpy", "zarr")
        if not isinstance(path, RemoteFolder) or (known and not isinstance(error, NotImplementedError)):
            raise
        raise StoreError(  # every file system has errors of its own
            f"cannot {action} `path` {path}: {type(error).__name__} {error}. Check the URL and your access."
        ) from error


def _our_attributes(path: Location) -> dict[str, Any] | None:
    return attributes_of(path, FORMAT)


def attributes_of(path: Location, own_format: str) -> dict[str, Any] | None:
    """Return the attributes of a zarr group whose `format` is this one; None for anything else."""
    metadata = path.read_file("zarr.json")
    if metadata is None:
        return None
    try:
        content = json.loads(metadata)
        attributes = content["attributes"]
        ours = content["node_type"] == "group" and attributes["format"] == own_format
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return dict(attributes) if ours else None
