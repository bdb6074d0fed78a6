"""What lies at a path: nothing, a result of ours, or something foreign that must not be touched.

The only file that creates, replaces and deletes folders. A result appears whole (built beside its place, then renamed)
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import zarr

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
_ATTRIBUTES_BYTES = 2**26  # of attributes and consolidated metadata, at most


def is_local_url(path: str | os.PathLike[str]) -> bool:
    """Whether it is the URL of a folder of this host's file systems."""
    return str(path).startswith(("file://", "local://"))


def local_path(path: str | os.PathLike[str]) -> Path:
    """`path` made absolute, links resolved; a `file://` URL is one, too.

    Raises SettingError for other URLs.
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
        return Path(path).expanduser().resolve()


def place_of(path: str | os.PathLike[str]) -> Path | RemoteFolder:
    """Where a result is read from: a URL as it is, a path made absolute. Raises SettingError."""
    remote = "://" in str(path) and not is_local_url(path)
    return RemoteFolder(str(path)) if remote else local_path(path)


def read_attributes(path: Path | RemoteFolder) -> dict[str, Any]:
    """The attributes of our result at `path`. Raises StoreNotFoundError, ForeignStoreError, or StoreError (too new)."""
    with surfaced_errors("read", path):
        attributes = _our_attributes(path)
        if attributes is None and (isinstance(path, RemoteFolder) or not path.exists()):
            raise StoreNotFoundError(f"`path` {path} does not exist, expected a result. Check it for typing errors.")
    if attributes is None:
        found = "a URL" if isinstance(path, RemoteFolder) else _looks_like(path)
        raise ForeignStoreError(f"`path` {path} is not a result of distinfluence: {found}. Pass another path.")
    version = attributes.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(
            f"`path` {path} has format version {version!r}, this distinfluence reads up to {FORMAT_VERSION}. "
            "Install a newer distinfluence."
        )
    return attributes


def has_file(place: Path | RemoteFolder, key: str) -> bool:
    """Whether a file of a result is there."""
    return place.has(key) if isinstance(place, RemoteFolder) else (place / key).is_file()


def delete_files(place: Path | RemoteFolder, keys: Iterable[str]) -> None:
    """Delete files, or folders, of a result, those that are there."""
    for key in keys:
        if isinstance(place, RemoteFolder):
            place.delete(key)
        elif (place / key).is_dir():
            shutil.rmtree(place / key, ignore_errors=True)
        else:
            (place / key).unlink(missing_ok=True)


def settle(place: Path | RemoteFolder, keys: Iterable[str]) -> None:
    """Have files of a result outlive a power failure; behind a URL they do, once they are written."""
    if not isinstance(place, RemoteFolder):
        sync_to_disk([place / key for key in keys])


def zarr_store(place: Path | RemoteFolder) -> Any:
    """What zarr writes to."""
    return place.store(read_only=False) if isinstance(place, RemoteFolder) else str(place)


def is_used(place: Path | RemoteFolder) -> bool:
    """Whether anything lies there, more than an empty folder."""
    if isinstance(place, RemoteFolder):
        return bool(place.names())
    return place.exists() and not (place.is_dir() and not any(place.iterdir()))


def require_free(path: Path | RemoteFolder, overwrite: bool) -> None:
    """Pass if a result may be put at `path`: nothing or an empty folder is there, or a result of ours and `overwrite`.

    Raises ForeignStoreError or StoreExistsError. Touches nothing.
    """
    with surfaced_errors("read", path):
        if not is_used(path):
            return
        if _our_attributes(path) is None:
            raise ForeignStoreError(
                f"`path` {path} holds something that distinfluence did not write ({_looks_like(path)}); nothing was "
                "touched. Pass another path."
            )
        if not overwrite:
            raise StoreExistsError(
                f"`path` {path} holds a result already. Pass existing='resume' (--resume) to continue it, or "
                "existing='replace' (--overwrite) to delete it."
            )
        names = path.names() if isinstance(path, RemoteFolder) else [entry.name for entry in path.iterdir()]
        strangers = sorted(set(names) - _OWN_ENTRIES)
    if strangers:
        raise ForeignStoreError(
            f"`path` {path} holds a result, but also {', '.join(strangers[:5])}, which distinfluence did not write; "
            "nothing was touched. Move that away, or pass another path."
        )


def put_in_place(path: Path | RemoteFolder, overwrite: bool, build: Callable[[Path | RemoteFolder], None]) -> None:
    """Have `build` make the folder beside `path`, then rename it to `path`, so that it is there whole or not at all.

    With `overwrite`, a result of ours at `path` is deleted after the new one is built. Behind a URL nothing can be
    renamed: it is deleted first, and the new one built in its place.
    """
    require_free(path, overwrite)
    if isinstance(path, RemoteFolder):
        with surfaced_errors("create", path):
            path.delete()
            build(path)
        return
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    replaced = beside.with_suffix(".old")
    with surfaced_errors("create", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            build(beside)
            require_free(path, overwrite)
            if path.exists() and any(path.iterdir()):
                path.rename(replaced)
            beside.rename(path)
        except BaseException:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        if replaced.exists():
            shutil.rmtree(replaced)


def sync_to_disk(files: list[Path]) -> None:
    """fsync files and their folders; those that do not exist are skipped. zarr renames but never syncs."""
    for path in [*files, *sorted({file.parent for file in files})]:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def consolidate(path: Path | RemoteFolder) -> None:
    """Note the metadata of all arrays in the group's own, so that readers need one look: of a complete result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # consolidated metadata is no part of the v3 specification, yet
        zarr.consolidate_metadata(zarr_store(path))


def sweep_unfinished_files(path: Path | RemoteFolder) -> None:
    """Delete the `.partial` files that killed writers left behind, if nobody has written to them for 15 minutes."""
    if isinstance(path, RemoteFolder):
        return
    for file in path.rglob("*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                file.unlink()


@contextlib.contextmanager
def surfaced_errors(action: str, path: Path | RemoteFolder) -> Iterator[None]:
    """Raise what the operating system and zarr's checksums say as StoreError with path and remedy."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        surfaced = (DiskFullError if error.errno in FULL else StoreError)(
            f"cannot {action} `path` {path}: {error.strerror or error}. Free space or correct the permissions, then "
            "run again with `resume`; strips that are marked are kept."
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


def _our_attributes(path: Path | RemoteFolder) -> dict[str, Any] | None:
    if isinstance(path, RemoteFolder):
        metadata = path.read_bytes("zarr.json")
    else:
        metadata = (path / "zarr.json").read_bytes() if _is_readable(path / "zarr.json") else None
    if metadata is None:
        return None
    try:
        content = json.loads(metadata)
        attributes = content["attributes"]
        ours = content["node_type"] == "group" and attributes["format"] == FORMAT
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return dict(attributes) if ours else None


def _is_readable(file: Path) -> bool:
    """Whether it is there. Raises CorruptStoreError for one that is too large to be ours: it may be all holes."""
    if not file.is_file():
        return False
    if file.stat().st_size > _ATTRIBUTES_BYTES:
        raise CorruptStoreError(
            f"`zarr.json` of {file.parent} has {file.stat().st_size} bytes, expected at most {_ATTRIBUTES_BYTES}. Pass "
            "another path."
        )
    return True


def _looks_like(path: Path | RemoteFolder) -> str:
    if isinstance(path, RemoteFolder):
        return f"a URL with {', '.join(path.names()[:3])}"
    if not path.is_dir():
        return "a file"
    if any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
        return "another zarr store"
    entries = sorted(entry.name for entry in path.iterdir())
    return (
        f"a folder with {', '.join(entries[:3])}{', …' if len(entries) > 3 else ''}" if entries else "an empty folder"
    )
