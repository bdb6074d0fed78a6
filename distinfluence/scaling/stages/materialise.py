"""dask arrays written to files, chunk by chunk, by the workers that compute them."""

import itertools
import uuid
from pathlib import Path

import numpy as np
from dask.delayed import Delayed

from distinfluence.influence.arrays import Array
from distinfluence.model.data.tree import map_leaves
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
    sources = [ArraySource(files[i], 0, size, f"{key}/{i}") for i, size in enumerate(data.sizes)]
    return ChunkedData(data.sizes, tuple(sources))


def store_chunk(chunk: Chunk, folder: str, name: str) -> LeafTree:
    """Write a chunk's arrays to .npy files in a folder, whole or not at all; the files in the batch's form."""
    numbers = itertools.count()
    files: LeafTree = map_leaves(
        lambda array: _stored(np.asarray(array), Path(folder) / f"{name}-{next(numbers)}.npy"), load(chunk)
    )
    return files


def _stored(array: Array, path: Path) -> NpyLeaf:
    save_whole(path, array)
    return NpyLeaf(str(path), array.shape)
