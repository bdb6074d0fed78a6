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
from collections.abc import Callable, Iterator
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
from distinfluence.store.remote import RemoteFolder

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


def local_path(path: str | os.PathLike[str]) -> Path:
    """`path` made absolute, links resolved; a `file://` URL is one, too.

    Raises SettingError for other URLs: results are written to folders, where files are renamed into place and synced.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise SettingError(f"`path` must be a str or Path, got {path!r}. Pass the folder of the result.")
    if str(path).startswith("file://"):
        path = str(path).removeprefix("file://")
    if "://" in str(path):
        raise SettingError(
            f"`path` must be a folder to be written to, got {str(path)!r}. URLs can be read; mount the object store, "
            "or copy the finished result there: fsspec.filesystem(…).put(path, url, recursive=True)."
        )
    with surfaced_errors("resolve", Path(path)):
        return Path(path).expanduser().resolve()


def place_of(path: str | os.PathLike[str]) -> Path | RemoteFolder:
    """Where a result is read from: a URL as it is, a path made absolute. Raises SettingError."""
    remote = "://" in str(path) and not str(path).startswith("file://")
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


def require_free(path: Path, overwrite: bool) -> None:
    """Pass if a result may be put at `path`: nothing or an empty folder is there, or a result of ours and `overwrite`.

    Raises ForeignStoreError or StoreExistsError. Touches nothing.
    """
    with surfaced_errors("read", path):
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if _our_attributes(path) is None:
            raise ForeignStoreError(
                f"`path` {path} holds something that distinfluence did not write ({_looks_like(path)}); nothing was "
                "touched. Pass another path."
            )
        if not overwrite:
            raise StoreExistsError(
                f"`path` {path} holds a result already. Pass `resume` to go on with it, or `overwrite` to delete it."
            )
        strangers = sorted({entry.name for entry in path.iterdir()} - _OWN_ENTRIES)
    if strangers:
        raise ForeignStoreError(
            f"`path` {path} holds a result, but also {', '.join(strangers[:5])}, which distinfluence did not write; "
            "nothing was touched. Move that away, or pass another path."
        )


def put_in_place(path: Path, overwrite: bool, build: Callable[[Path], None]) -> None:
    """Have `build` make the folder beside `path`, then rename it to `path`, so that it is there whole or not at all.

    With `overwrite`, a result of ours at `path` is deleted after the new one is built.
    """
    require_free(path, overwrite)
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


def consolidate(path: Path) -> None:
    """Note the metadata of all arrays in the group's own, so that readers need one look: of a complete result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # consolidated metadata is no part of the v3 specification, yet
        zarr.consolidate_metadata(str(path))


def sweep_unfinished_files(path: Path) -> None:
    """Delete the `.partial` files that killed writers left behind, if nobody has written to them for 15 minutes."""
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


def _our_attributes(path: Path | RemoteFolder) -> dict[str, Any] | None:
    if isinstance(path, RemoteFolder):
        metadata = path.read_bytes("zarr.json")
    else:
        metadata = (path / "zarr.json").read_bytes() if (path / "zarr.json").is_file() else None
    if metadata is None:
        return None
    try:
        content = json.loads(metadata)
        attributes = content["attributes"]
        ours = content["node_type"] == "group" and attributes["format"] == FORMAT
    except (ValueError, LookupError, TypeError):
        return None
    return dict(attributes) if ours else None


def _looks_like(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    if any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
        return "another zarr store"
    entries = sorted(entry.name for entry in path.iterdir())
    return (
        f"a folder with {', '.join(entries[:3])}{', …' if len(entries) > 3 else ''}" if entries else "an empty folder"
    )
