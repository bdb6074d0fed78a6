"""Data sets in chunks that are loaded where they are used.

A chunk is a `ChunkSource`: a few hundred bytes that say where its samples are, or, for dask arrays, the task that makes
them. Arrays and tensors in the caller's memory are written once to memory-mapped files in the scratch folder; zarr
arrays and data sets given as a `Recipe` are never read by the caller at all.
"""

import itertools
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import dask
import numpy as np
from dask.delayed import Delayed
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset, default_collate

from distinfluence.errors import ChunkError, DtypeError, EmptyDataError, RecipeError, ShapeError
from distinfluence.influence.arrays import Array, ArrayBatch
from distinfluence.scaling.data.recipe import Recipe
from distinfluence.scaling.data.sources import ArraySource, ChunkSource, DatasetSource, Home, common_length, leaf_tree

CHUNK_SIZE = 256  # samples, where nobody says better


DATASET_BYTES = 8 * 2**20  # a pickled data set that is larger carries its samples with it


@dataclass(frozen=True)
class ChunkedData:
    """A data set cut into chunks.

    Args:
        sizes: Samples in each chunk.
        chunks: For each chunk, where it is loaded from, or the dask task that makes its arrays.
    """

    sizes: tuple[int, ...]
    chunks: tuple[ChunkSource | Delayed, ...]

    @property
    def n_samples(self) -> int:
        """Samples of all chunks."""
        return sum(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first sample of each chunk."""
        return tuple(itertools.accumulate(self.sizes[:-1], initial=0))

    @property
    def sources(self) -> tuple[ChunkSource, ...]:
        """The chunks, where all of them can be loaded anywhere. Raises ChunkError for dask arrays."""
        found = tuple(chunk for chunk in self.chunks if isinstance(chunk, ChunkSource))
        if len(found) < len(self.chunks):
            raise ChunkError("dask arrays must be stored before every worker can read them. Call `stored` first.")
        return found

    def looked_at(self, sha256: Sequence[str]) -> "ChunkedData":
        """Have the chunks compared with their fingerprints whenever they are loaded again.

        Args:
            sha256: The fingerprint of each chunk.

        Returns:
            The same chunks with these fingerprints.
        """
        chunks = [
            replace(chunk, sha256=own) if isinstance(chunk, (ArraySource, DatasetSource)) else chunk
            for chunk, own in zip(self.chunks, sha256, strict=True)
        ]
        return replace(self, chunks=tuple(chunks))

    @property
    def strip(self) -> int:
        """The common chunk size. Raises ChunkError if a chunk but the last is smaller or larger."""
        first = self.sizes[0]
        if any(size != first for size in self.sizes[:-1]) or self.sizes[-1] > first:
            raise ChunkError(
                f"`x` must have training chunks of one size (the last may be smaller) to be written as strips, got "
                f"{self.sizes[:10]}. Call `x.rechunk({{0: {max(self.sizes)}}})`, and the same for `y`."
            )
        return first


def recut(data: ChunkedData, size: int) -> ChunkedData:
    """Return the same samples in chunks of another size. Raises ChunkError for those of dask arrays: rechunk these."""
    if set(data.sizes[:-1]) <= {size} and data.sizes[-1] <= size:
        return data
    first = data.sources[0]
    if not isinstance(first, (ArraySource, DatasetSource)) or any(
        source.start != start for source, start in zip(data.sources, data.starts, strict=True)
    ):
        raise ChunkError("`data` lies in files of one chunk each. Rechunk the arrays that it was made of.")
    name = first.key.partition("/")[0]
    return _cut(data.n_samples, size, lambda a, b: replace(first, start=a, stop=b, key=f"{name}/{a}-{b}", sha256=""))


def take_samples(data: ChunkedData, index: NDArray[np.int64]) -> ArrayBatch:
    """Return the samples of these sorted indices as one batch, loading only the chunks that hold them."""
    chunk_of = np.searchsorted(np.array(data.starts), index, side="right") - 1
    parts = [
        taken(data.sources[chunk].load(), index[chunk_of == chunk] - data.starts[chunk])
        for chunk in np.unique(chunk_of).tolist()
    ]
    return _joined(parts)


def taken(batch: ArrayBatch, index: NDArray[np.int64]) -> ArrayBatch:
    """Return the samples of a batch with these indices."""
    if isinstance(batch, dict):
        return {key: taken(value, index) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(taken(value, index) for value in batch)
    chosen: Array = np.asarray(batch)[index]
    return chosen


def _joined(parts: list[ArrayBatch]) -> ArrayBatch:
    first = parts[0]
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts if isinstance(part, dict)]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined([part[i] for part in parts if isinstance(part, tuple)]) for i in range(len(first)))
    return np.concatenate([np.asarray(part) for part in parts])


def chunked(
    x: object, y: object | None, home: Home, chunk_size: int | None = None, default_size: int = CHUNK_SIZE
) -> ChunkedData:
    """Cut a data set into chunks.

    Args:
        x: Tensors, NumPy, zarr or dask arrays with the samples along the first dimension. Without `y` also a tuple or
            dict of these, a map-style torch `Dataset`, a DataLoader that does not shuffle, a `Recipe` of any of these,
            or a `ChunkedData`.
        y: The targets, in the same form, or None if `x` has them.
        home: Where data of the caller go.
        chunk_size: Samples in a chunk. If None, dask arrays and loaders bring their own.
        default_size: Samples in a chunk of other data if `chunk_size` is None.

    Returns:
        The data set in chunks.

    Raises:
        ShapeError: The arrays have different lengths.
        ChunkError: The chunks do not line up.
        EmptyDataError: There are no samples.
        DtypeError: The data have a type that is not supported.
    """
    if isinstance(x, ChunkedData):
        return x
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ChunkError(f"`chunk_size` must be a whole number of samples ≥ 1, got {chunk_size!r}.")
    data = x if y is None else (x, y)
    if isinstance(data, Recipe):
        return _of_recipe(data, home, chunk_size or default_size)
    if isinstance(data, DataLoader):
        return _of_loader(data, home, chunk_size, default_size)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset):
        return _of_dataset(data, None, chunk_size or default_size)
    if _any_dask(data):
        return _of_dask(data, chunk_size)
    leaves = leaf_tree(data, home, "data")
    key = uuid.uuid4().hex
    return _cut(
        common_length(leaves), chunk_size or default_size, lambda a, b: ArraySource(leaves, a, b, f"{key}/{a}-{b}")
    )


def _cut(n: int, chunk_size: int, source: Callable[[int, int], ChunkSource]) -> ChunkedData:
    if n == 0:
        raise EmptyDataError("`x` must hold at least one sample, got none. Pass a data set that isn't empty.")
    size = min(chunk_size, n)
    edges = [*range(0, n, size), n]
    ranges = list(itertools.pairwise(edges))
    return ChunkedData(tuple(b - a for a, b in ranges), tuple(source(a, b) for a, b in ranges))


def _of_recipe(recipe: Recipe, home: Home, chunk_size: int) -> ChunkedData:
    key = home.key(recipe)
    return _cut(home.length(recipe, key), chunk_size, lambda a, b: DatasetSource(recipe, None, a, b, f"{key}/{a}-{b}"))


def _of_loader(loader: "DataLoader[Any]", home: Home, chunk_size: int | None, default_size: int) -> ChunkedData:
    if loader.batch_sampler is not None and not isinstance(loader.sampler, SequentialSampler):
        raise ChunkError(
            f"`x` must be a DataLoader in a fixed order, got one with {type(loader.sampler).__name__}: its samples "
            "would have no numbers. Pass shuffle=False."
        )
    if loader.drop_last:
        raise ChunkError("`x` must be a DataLoader over all samples, got drop_last=True. Pass drop_last=False.")
    size = chunk_size or loader.batch_size or default_size
    data = loader.dataset
    if isinstance(data, TensorDataset) and loader.collate_fn is default_collate:
        return chunked(data.tensors, None, home, size)
    return _of_dataset(data, None if loader.collate_fn is default_collate else loader.collate_fn, size)


def _of_dataset(data: "Dataset[Any]", collate: Callable[..., object] | None, chunk_size: int) -> ChunkedData:
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise DtypeError(
            f"`x` must be a map-style data set, got {type(data).__name__}. Give it `__len__` and `__getitem__`."
        )
    pickled = bytes(cloudpickle.dumps(data))
    if len(pickled) > DATASET_BYTES:
        raise RecipeError(
            f"`x` is a {type(data).__name__} of {len(pickled) / 2**20:.0f} MiB, too much to go with the tasks. Pass "
            "`Recipe('module:callable')`, so that each worker builds it, or its arrays."
        )
    fixed_collate = None if collate is None else bytes(cloudpickle.dumps(collate))
    key = uuid.uuid4().hex
    return _cut(len(data), chunk_size, lambda a, b: DatasetSource(pickled, fixed_collate, a, b, f"{key}/{a}-{b}"))


def is_dask_array(data: object) -> bool:
    """Return whether this is a dask array, which only a process that has imported `dask.array` can hold.

    Workers and runs of other data do not import it: that takes almost a second of CPU where xarray is installed.
    """
    module = sys.modules.get("dask.array")
    return module is not None and isinstance(data, module.Array)


def _any_dask(data: object) -> bool:
    if isinstance(data, Mapping):
        return any(_any_dask(value) for value in data.values())
    if isinstance(data, (tuple, list)):
        return any(_any_dask(value) for value in data)
    return is_dask_array(data)


def _of_dask(data: object, chunk_size: int | None) -> ChunkedData:
    columns = dict(_dask_columns(data, "data"))
    for name, array in columns.items():
        if any(np.isnan(size) for size in array.chunks[0]):
            raise ChunkError(f"`{name}` must have known chunk sizes. Call `compute_chunk_sizes()` on it.")
    chunks = {name: tuple(int(size) for size in array.chunks[0]) for name, array in columns.items()}
    lengths = {name: sum(sizes) for name, sizes in chunks.items()}
    if len(set(lengths.values())) > 1:
        raise ShapeError(f"`x` and `y` must have as many samples, got {lengths}. Pass inputs and targets that match.")
    if len(set(chunks.values())) > 1:
        raise ChunkError(
            f"`x` and `y` must have the same chunks along the samples, got {chunks}. "
            "Call `y.rechunk({0: x.chunks[0]})`."
        )
    sizes = next(iter(chunks.values()))
    if 0 in sizes:
        raise EmptyDataError(f"`x` must have samples in every chunk, got chunks {sizes}.")
    if chunk_size is not None and set(sizes) != {chunk_size}:
        columns = {name: array.rechunk({0: chunk_size}) for name, array in columns.items()}
        sizes = tuple(int(size) for size in next(iter(columns.values())).chunks[0])
    blocks = {
        name: array.rechunk(dict.fromkeys(range(1, array.ndim), -1)).to_delayed().reshape(-1)
        for name, array in columns.items()
    }
    parts = tuple(dask.delayed(_regroup(data, blocks, index, "data")) for index in range(len(sizes)))
    return ChunkedData(sizes, parts)


def _dask_columns(data: object, name: str) -> list[tuple[str, Any]]:
    if isinstance(data, Mapping):
        return [pair for key, value in data.items() for pair in _dask_columns(value, f"{name}[{key!r}]")]
    if isinstance(data, (tuple, list)):
        return [pair for index, value in enumerate(data) for pair in _dask_columns(value, f"{name}[{index}]")]
    if not is_dask_array(data):
        raise ChunkError(
            f"`{name}` must be a dask array as the others are, got {type(data).__name__}. Call "
            "`dask.array.from_array(…, chunks=…)` with the same chunks along the samples."
        )
    return [(name, data)]


def _regroup(data: object, blocks: Mapping[str, Any], index: int, name: str) -> object:
    if isinstance(data, Mapping):
        return {key: _regroup(value, blocks, index, f"{name}[{key!r}]") for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return tuple(_regroup(value, blocks, index, f"{name}[{i}]") for i, value in enumerate(data))
    return blocks[name][index]
