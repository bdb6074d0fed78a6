"""Data sets in chunks that are loaded where they are used.

A chunk is a `ChunkSource`: a few hundred bytes that say where its samples are, or, for dask arrays, the task that makes
them. Arrays and tensors in the caller's memory are written once to memory-mapped files in the scratch folder; zarr
arrays and data sets given as a `Recipe` are never read by the caller at all.
"""

import itertools
import operator
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import cloudpickle
import dask
import numpy as np
from dask.delayed import Delayed
from numpy.typing import NDArray

from distinfluence.errors import ChunkError, EmptyDataError, RecipeError, SettingError
from distinfluence.influence.arrays import ArrayBatch, to_numpy
from distinfluence.model.batch import Batch, alike, batch_length, joined, take
from distinfluence.model.data.arrays import Arrays, is_dask_array
from distinfluence.model.data.datasets import Fetched
from distinfluence.model.data.door import opened
from distinfluence.model.data.samples import Pieces, Samples
from distinfluence.model.data.tree import map_leaves, named_leaves
from distinfluence.scaling.data.recipe import Recipe
from distinfluence.scaling.data.sources import ArraySource, ChunkSource, DatasetSource, Home, kept_leaf

CHUNK_SIZE = 256  # samples, where nobody says better


DATASET_BYTES = 8 * 2**20  # a pickled data set that is larger carries its samples with it


@dataclass(frozen=True)
class ChunkedData:
    """A data set cut into chunks.

    Args:
        sizes: Samples in each chunk.
        chunks: For each chunk, where it is loaded from, or the dask task that makes its arrays.
        own_batches: Whether a loader's own function collates them, so that a plan should leave its batches.
    """

    sizes: tuple[int, ...]
    chunks: tuple[ChunkSource | Delayed, ...]
    own_batches: bool = False

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

    @property
    def can_be_recut(self) -> bool:
        """Whether all chunks are ranges of the same samples; not where each is a task or a file of its own."""
        return all(
            isinstance(chunk, (ArraySource, DatasetSource)) and chunk.start == start
            for chunk, start in zip(self.chunks, self.starts, strict=True)
        )

    def planned(self, asked: int | None) -> int | None:
        """Return the chunk size that a plan must take.

        Args:
            asked: What the user asked for, if anything.

        Returns:
            The size; None where the plan may choose.
        """
        if not self.can_be_recut:
            return self.sizes[0]
        return asked or (self.sizes[0] if self.own_batches else None)

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
    first = data.chunks[0]
    if not data.can_be_recut or not isinstance(first, (ArraySource, DatasetSource)):
        raise ChunkError("`data` lies in files of one chunk each. Rechunk the arrays that it was made of.")
    name = first.key.partition("/")[0]
    cut = _cut(data.n_samples, size, lambda a, b: replace(first, start=a, stop=b, key=f"{name}/{a}-{b}", sha256=""))
    return replace(cut, own_batches=data.own_batches)


def take_samples(data: ChunkedData, index: NDArray[np.int64]) -> ArrayBatch:
    """Return the samples of these sorted indices as one batch, loading only the chunks that hold them."""
    chunk_of = np.searchsorted(np.array(data.starts), index, side="right") - 1
    parts = [
        taken(data.sources[chunk].load(), index[chunk_of == chunk] - data.starts[chunk])
        for chunk in np.unique(chunk_of).tolist()
    ]
    whole: ArrayBatch = map_leaves(lambda *arrays: np.concatenate(arrays), *parts)
    return whole


def taken(batch: ArrayBatch, index: NDArray[np.int64]) -> ArrayBatch:
    """Return the samples of a batch with these indices."""
    chosen: ArrayBatch = map_leaves(lambda array: np.asarray(array)[index], batch)
    return chosen


def chunked(
    x: object, y: object | None, home: Home, chunk_size: int | None = None, default_size: int = CHUNK_SIZE
) -> ChunkedData:
    """Cut a data set into chunks.

    Args:
        x: Whatever `distinfluence.model.data.door.opened` takes, a `Recipe` that builds it, or a `ChunkedData`.
        y: The targets, arrays of as many samples, or None if `x` has them.
        home: Where data of the caller go.
        chunk_size: Samples in a chunk. If None, dask arrays, loaders and lists of batches bring their own.
        default_size: Samples in a chunk of other data if `chunk_size` is None.

    Returns:
        The data set in chunks.

    Raises:
        ChunkError: The chunks do not line up.
        DistinfluenceError: What `opened` raises.
    """
    if isinstance(x, (ChunkedData, Recipe)) and y is not None:
        raise SettingError(f"`y` must be None where `x` is a `{type(x).__name__}`, which has the targets. Omit it.")
    if isinstance(x, ChunkedData):
        return x
    size = None if chunk_size is None else _checked(chunk_size)
    if isinstance(x, Recipe):
        return _of_recipe(x, home, size, default_size)
    samples = opened(x, y)
    if samples.is_stream or isinstance(samples, Pieces):
        return _of_batches(samples, home, size)
    if isinstance(samples, Fetched) and isinstance(samples.data, list):
        if samples.sizes is not None:  # a loader's, whose batches need not be alike
            return _of_batches(samples, home, size)
        samples = opened(samples.read(0, len(samples)))
    if isinstance(samples, Arrays) and any(is_dask_array(leaf) for _, leaf in named_leaves(samples.tree, "x")):
        return _of_dask(samples, size)
    cut = size or (default_size if samples.sizes is None else max(samples.sizes))
    key = uuid.uuid4().hex
    if isinstance(samples, Arrays):
        tree, order = samples.tree, samples.order
        leaves = map_leaves(lambda leaf: kept_leaf(leaf if order is None else leaf[order], home), tree)
        return _cut(len(samples), cut, lambda a, b: ArraySource(leaves, a, b, f"{key}/{a}-{b}"))
    assert isinstance(samples, Fetched)
    pickled = _pickled(samples)
    kept = None if samples.order is None else home.keep(to_numpy(samples.order))
    found = _cut(len(samples), cut, lambda a, b: DatasetSource(pickled, a, b, f"{key}/{a}-{b}", order=kept))
    return replace(found, own_batches=samples.collate is not None)


def _checked(chunk_size: object) -> int:
    """Return a chunk size. Raises ChunkError unless it is a positive whole number, of Python or NumPy."""
    try:
        size = 0 if isinstance(chunk_size, bool) else operator.index(chunk_size)  # type: ignore[arg-type]
    except TypeError:
        size = 0
    if size < 1:
        raise ChunkError(f"`chunk_size` must be a whole number of samples ≥ 1, got {chunk_size!r}.")
    return size


def _cut(n: int, chunk_size: int, source: Callable[[int, int], ChunkSource]) -> ChunkedData:
    size = min(chunk_size, n)
    edges = [*range(0, n, size), n]
    ranges = list(itertools.pairwise(edges))
    return ChunkedData(tuple(b - a for a, b in ranges), tuple(source(a, b) for a, b in ranges))


def _of_recipe(recipe: Recipe, home: Home, chunk_size: int | None, default_size: int) -> ChunkedData:
    key = home.key(recipe)
    size = home.size(recipe, key)
    cut = chunk_size or size.batch or default_size
    found = _cut(size.n, cut, lambda a, b: DatasetSource(recipe, a, b, f"{key}/{a}-{b}"))
    return replace(found, own_batches=size.own_batches)


def _pickled(samples: Fetched) -> bytes:
    pickled = bytes(cloudpickle.dumps(samples.travelling()))
    if len(pickled) > DATASET_BYTES:
        raise RecipeError(
            f"`x` is a {type(samples.data).__name__} of {len(pickled) / 2**20:.0f} MiB, too much to go with the tasks. "
            "Pass `Recipe('module:callable')`, so that each worker builds it, or its arrays."
        )
    return pickled


def _of_batches(samples: Samples, home: Home, chunk_size: int | None) -> ChunkedData:
    """Read batches once and keep them chunk by chunk."""
    key, sizes = uuid.uuid4().hex, list[int]()
    sources: list[ChunkSource] = []
    for batch in _regrouped(samples, chunk_size):
        sizes.append(batch_length(batch))
        leaves = map_leaves(lambda tensor: home.keep(to_numpy(tensor)), batch)
        sources.append(ArraySource(leaves, 0, sizes[-1], f"{key}/{len(sources)}"))
    if not sizes:
        raise EmptyDataError(f"`{samples.name}` must hold at least one sample, got none. Pass data that are not empty.")
    return ChunkedData(tuple(sizes), tuple(sources))


def _regrouped(samples: Samples, chunk_size: int | None) -> Iterator[Batch]:
    """Yield batches of one size, by default the first one's; those of other shapes stay as they come."""
    size, held = chunk_size, list[Batch]()
    for batch in samples.batches():
        size = size or batch_length(batch)
        if held and not alike(held[0], batch):
            if chunk_size is not None:
                raise ChunkError(
                    f"`{samples.name}` has batches of samples of several shapes, which cannot be cut into chunks of "
                    f"{chunk_size}. Omit `chunk_size`, or pad all samples to one length."
                )
            yield joined(held)
            held = []
        held.append(batch)
        if sum(map(batch_length, held)) < size:
            continue
        whole, start = joined(held), 0
        while batch_length(whole) - start >= size:
            yield take(whole, start, start + size)
            start += size
            if start == batch_length(whole):
                break
        held = [take(whole, start, batch_length(whole))] if start < batch_length(whole) else []
    if held:
        yield joined(held)


def _of_dask(samples: Arrays, chunk_size: int | None) -> ChunkedData:
    tree, sizes = samples.tree, samples.sizes
    assert sizes is not None
    if chunk_size is not None and set(sizes) != {chunk_size}:
        tree = map_leaves(lambda array: array.rechunk({0: chunk_size}), tree)
        sizes = tuple(min(chunk_size, len(samples) - start) for start in range(0, len(samples), chunk_size))
    blocks = map_leaves(
        lambda array: array.rechunk(dict.fromkeys(range(1, array.ndim), -1)).to_delayed().reshape(-1), tree
    )
    parts = [dask.delayed(map_leaves(lambda own, i=index: own[i], blocks)) for index in range(len(sizes))]
    return ChunkedData(sizes, tuple(parts))
