"""The way to a result's bytes: a local store that counts what it reads and never leaves its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import ByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec, ShardingCodec
from zarr.core.array_spec import ArraySpec as ChunkSpec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from distinfluence.errors import CorruptStoreError
from distinfluence.store.format.folder import Location
from distinfluence.store.format.layout import ArraySpec
from distinfluence.store.format.remote import RemoteFolder, RemoteStore

_FILE_BYTES = 2**28  # a file that is read at once, where the layout does not say more
_CHUNK_BYTES = 2**26  # a chunk that a hostile result may have at most, where its layout does not say more


class GuardedStore(LocalStore):
    """Reads a folder, without following links out of it: a result that somebody sent must not show other files.

    Attributes:
        bytes_read: Bytes read from its files since it was opened, metadata included.
        largest: Bytes of a file that may be read at once; a file with holes can say that it has any number.

    Raises:
        CorruptStoreError: A link leads a key out of the folder.
    """

    def __init__(self, root: Path | str, *, read_only: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self.bytes_read = 0
        self.largest = _FILE_BYTES
        self._inside = os.path.join(os.path.realpath(root), "")

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read as the store's own method does, counted: this runs on zarr's one thread of input and output."""
        self._guard(key, byte_range)
        return self._counted(await super().get(key, prototype, byte_range))

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read as the store's own method does, counted."""
        self._guard(key, byte_range)
        return self._counted(super().get_sync(key, prototype=prototype, byte_range=byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read as the store's own method does, counted."""
        key_ranges = list(key_ranges)
        for key, byte_range in key_ranges:
            self._guard(key, byte_range)
        return [self._counted(buffer) for buffer in await super().get_partial_values(prototype, key_ranges)]

    def _guard(self, key: str, byte_range: ByteRequest | None) -> None:
        path = os.path.realpath(os.path.join(self.root, key))
        if not path.startswith(self._inside):
            raise CorruptStoreError(
                f"`{key}` of {self.root} is a link that leads out of the result and is not followed. Copy the file."
            )

        if byte_range is None and os.path.isfile(path) and os.path.getsize(path) > self.largest:
            raise CorruptStoreError(
                f"`{key}` of {self.root} has {os.path.getsize(path)} bytes, at most {self.largest} are read at once. "
                "Compute the result again."
            )

    def _counted(self, buffer: Buffer | None) -> Buffer | None:
        if buffer is not None:
            self.bytes_read += len(buffer)
        return buffer


def open_to_read(path: Location) -> tuple[zarr.Group, GuardedStore | RemoteStore]:
    """Open the group at `path`; return it and the store that it reads from."""
    store = path.store() if isinstance(path, RemoteFolder) else GuardedStore(path)
    return zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False), store


def checked(array: object, spec: ArraySpec, path: Location) -> zarr.Array[Any]:
    """Return `array`, if it is what a result of this layout has under this name.

    Its chunks may be cut otherwise, but none may be larger than the layout's, nor than 64 MiB: a few bytes of metadata
    would otherwise ask for all memory.

    Raises:
        CorruptStoreError: The array is not what the layout says.
    """
    expected = f"{list(spec.shape)} {spec.dtype}"
    if not isinstance(array, zarr.Array):
        raise CorruptStoreError(f"`{spec.name}` of {path} must be an array {expected}, got a group. Compute it again.")
    got = f"{list(array.shape)} {array.dtype}"
    if got != expected:
        raise CorruptStoreError(f"`{spec.name}` of {path} must be {expected}, got {got}. Compute the result again.")
    allowed = max(_CHUNK_BYTES, _size(spec.chunks) * array.dtype.itemsize)
    if _size(array.chunks) * array.dtype.itemsize > allowed:
        raise CorruptStoreError(
            f"`{spec.name}` of {path} must have chunks of at most {allowed} bytes, got {array.chunks}. Rechunk it."
        )
    return _bounded(array)


class ExactBlosc(BloscCodec):
    """Blosc that refuses a chunk whose header says other than the bytes of a chunk: it would be given that memory."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ChunkSpec) -> Buffer:
        expected = _size(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        said = int.from_bytes(chunk_bytes.as_numpy_array()[4:8].tobytes(), "little")  # of the 16 bytes of its header
        if said != expected:
            raise CorruptStoreError(
                f"a chunk of the result says that it expands to {said} bytes, expected {expected}. Compute it again."
            )
        return super()._decode_sync(chunk_bytes, chunk_spec)


def _bounded(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return `array` with its Blosc, also the one within shards, in the form that bounds what it expands to."""

    def exact(codec: Any) -> Any:
        if isinstance(codec, ShardingCodec):
            return replace(codec, codecs=tuple(exact(inner) for inner in codec.codecs))
        return ExactBlosc.from_dict(codec.to_dict()) if type(codec) is BloscCodec else codec

    metadata: Any = array.metadata
    if all(type(codec) is not BloscCodec for codec in array.compressors):
        return array
    bounded = replace(metadata, codecs=tuple(exact(codec) for codec in metadata.codecs))
    return zarr.Array(zarr.AsyncArray(bounded, array.store_path, array.async_array.config))


def is_bounded(array: zarr.Array[Any]) -> bool:
    """Whether its codecs give as many bytes as a chunk has: one that expands lets a small file ask for all memory."""
    return all(type(codec) in (Crc32cCodec, ExactBlosc) for codec in array.compressors) and not array.filters


def largest_file(specs: Iterable[ArraySpec]) -> int:
    """Return the bytes of the largest file of these arrays, with room for checksums and the index of a shard."""
    return max(_FILE_BYTES, *(_size(spec.shards or spec.chunks) * 4 * 5 // 4 for spec in specs))


def _size(shape: Iterable[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
