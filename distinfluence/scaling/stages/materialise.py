"""dask arrays written to files, chunk by chunk, by the workers that compute them."""

import uuid
from pathlib import Path

import numpy as np
from dask.delayed import Delayed

from distinfluence.influence.arrays import (
    ArrayBatch,
)
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.data.sources import ArraySource, LeafTree, NpyLeaf
from distinfluence.scaling.dispatch.executor import Executor
from distinfluence.scaling.scratch import save_whole
from distinfluence.scaling.worker.cache import Chunk, load


def stored(data: ChunkedData, folder: Path, executor: Executor) -> ChunkedData:
    """dask arrays computed and written by the workers, chunk by chunk; other data as they are."""
    if not any(isinstance(chunk, Delayed) for chunk in data.chunks):
        return data
    key = uuid.uuid4().hex
    items = [(chunk, str(folder), f"{key}-{i:06d}") for i, chunk in enumerate(data.chunks)]
    files = dict(executor.run(store_chunk, (), items))
    sources = [ArraySource(_npy_leaves(files[i]), 0, size, f"{key}/{i}") for i, size in enumerate(data.sizes)]
    return ChunkedData(data.sizes, tuple(sources))


def _npy_leaves(files: ArrayBatch) -> LeafTree:
    if isinstance(files, dict):
        return {name: _npy_leaves(value) for name, value in files.items()}
    if isinstance(files, tuple):
        return tuple(_npy_leaves(value) for value in files)
    path, *shape = (str(part) for part in files)
    return NpyLeaf(path, tuple(int(length) for length in shape))


def store_chunk(chunk: Chunk, folder: str, name: str) -> ArrayBatch:
    """Write a chunk's arrays to .npy files in a folder, whole or not at all; the files' names in the batch's form."""
    return _stored(load(chunk), Path(folder), name)


def _stored(arrays: ArrayBatch, folder: Path, name: str) -> ArrayBatch:
    if isinstance(arrays, dict):
        return {key: _stored(value, folder, f"{name}-{i}") for i, (key, value) in enumerate(arrays.items())}
    if isinstance(arrays, tuple):
        return tuple(_stored(value, folder, f"{name}-{i}") for i, value in enumerate(arrays))
    path = folder / f"{name}.npy"
    save_whole(path, np.asarray(arrays))
    return np.array([str(path), *map(str, np.asarray(arrays).shape)])
