"""Where the samples of a chunk are: files, zarr arrays, data sets that each process builds for itself.

A `ChunkSource` is a few hundred bytes that travel with a task; `load` reads its samples where the task runs.
"""

import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import cloudpickle
import dask
import numpy as np
import torch
import zarr
from torch import Tensor

from distinfluence.influence.arrays import Array, ArrayBatch, to_numpy, to_numpy_batch
from distinfluence.memory import process_bytes
from distinfluence.model.data.datasets import Fetched
from distinfluence.model.data.door import opened
from distinfluence.model.data.samples import Samples
from distinfluence.model.data.tree import map_leaves
from distinfluence.scaling.data.recipe import Recipe
from distinfluence.scaling.scratch import save_whole

KEPT_DATA_SETS = 4  # that a process keeps built: training and test data of two runs


class Leaf(Protocol):
    """One array of a data set, samples along its first dimension, read range by range."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""

    def read(self, start: int, stop: int) -> Array:
        """Return samples start to stop, in memory."""


@dataclass(frozen=True)
class MemoryLeaf:
    """An array of this process."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return self.array.shape

    def read(self, start: int, stop: int) -> Array:
        """Return a view of the samples."""
        view: Array = self.array[start:stop]
        return view


@dataclass(frozen=True)
class NpyLeaf:
    """An array in a .npy file that every worker sees."""

    path: str
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> Array:
        """Return the samples, copied out of the memory-mapped file."""
        return np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[start:stop])


@dataclass(frozen=True)
class ZarrLeaf:
    """A zarr array; it travels as the address of its store."""

    array: zarr.Array[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return self.array.shape

    def read(self, start: int, stop: int) -> Array:
        """Return the samples, decoded."""
        return np.asarray(self.array[start:stop])


LeafTree: TypeAlias = "Leaf | tuple[LeafTree, ...] | dict[str, LeafTree]"


class Home(Protocol):
    """Where data of the caller go, and who looks at data that the caller must not load."""

    def keep(self, array: Array) -> Leaf:
        """Put an array of the caller's process where every task can read it."""

    def size(self, recipe: Recipe, key: str) -> "Size":
        """Return how much the recipe builds, found where tasks run; `key`: under which it is kept there."""

    def key(self, recipe: Recipe) -> str:
        """Return a key, the same for the same recipe as long as this home lasts: it is built once in each process."""


class Keys:
    """Keys of recipes. Not their own: what they build may have changed since the last run."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def key(self, recipe: Recipe) -> str:
        """Return a new key for a recipe that was not seen yet."""
        return self._keys.setdefault(repr(recipe), uuid.uuid4().hex)


class InThisProcess(Keys):
    """Data stay where they are."""

    def keep(self, array: Array) -> Leaf:
        """Return the array itself."""
        return MemoryLeaf(array)

    def size(self, recipe: Recipe, key: str) -> "Size":
        """Build it here."""
        return recipe_size(recipe, key)


class InFiles(InThisProcess):
    """Arrays of the caller are written to files in a folder that every task sees."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def keep(self, array: Array) -> Leaf:
        """Write the array to a file in the folder."""
        return spill(array, self._folder)


class ChunkSource(ABC):
    """Samples start to stop, where they are.

    Attributes:
        start: The first sample.
        stop: One after the last sample.
        key: The same for the same samples, within a run.
        sha256: Fingerprint of the arrays when they were looked at, "" before.
    """

    start: int
    stop: int
    key: str
    sha256: str

    @abstractmethod
    def load(self) -> ArrayBatch:
        """Return the samples, as NumPy arrays."""


@dataclass(frozen=True)
class ArraySource(ChunkSource):
    """A range of samples of arrays."""

    leaves: LeafTree
    start: int
    stop: int
    key: str
    sha256: str = ""

    def load(self) -> ArrayBatch:
        """Read the range of each array."""
        arrays: ArrayBatch = map_leaves(lambda leaf: leaf.read(self.start, self.stop), self.leaves)
        return arrays


@dataclass(frozen=True)
class DatasetSource(ChunkSource):
    """A range of the samples that a recipe builds, or that travel as a pickle; each process opens them once."""

    recipe: Recipe | bytes
    start: int
    stop: int
    key: str
    sha256: str = ""
    order: Leaf | None = None  # which samples are meant, of a pickle; next to it, as it may be the larger

    def load(self) -> ArrayBatch:
        """Collate the samples, or slice the arrays."""
        samples = built_once(self.recipe, self.key.partition("/")[0], self.order)
        with dask.config.set(scheduler="synchronous"):  # a task that waits for tasks would stop its worker
            return to_numpy_batch(samples.read(self.start, self.stop))


_data_sets: OrderedDict[str, Samples] = OrderedDict()
_grown: dict[str, int] = {}  # by how much the process did when it built them


def built_once(recipe: Recipe | bytes, key: str, order: Leaf | None = None) -> Samples:
    """Return the samples that the recipe (or the pickle) builds, kept under `key`; a stream is read into memory."""
    if key not in _data_sets:
        before = process_bytes()
        if isinstance(recipe, bytes):
            pickled: Fetched = cloudpickle.loads(recipe)
            pickled.order = None if order is None else torch.tensor(order.read(0, order.shape[0]))
            _data_sets[key] = pickled
        else:
            with dask.config.set(scheduler="synchronous"):
                _data_sets[key] = opened(recipe.build(), name=recipe.target).fixed()
        _grown[key] = max(0, process_bytes() - before)
        while len(_data_sets) > KEPT_DATA_SETS:
            oldest, _ = _data_sets.popitem(last=False)
            del _grown[oldest]
    return _data_sets[key]


def built_bytes(source: "ChunkSource") -> int:
    """Return about how much memory this process took to build the data set of a chunk that it has loaded."""
    return _grown.get(source.key.partition("/")[0], 0) if isinstance(source, DatasetSource) else 0


@dataclass(frozen=True)
class Size:
    """How much data a recipe builds.

    n: samples. batch: the largest batch that they come in, None if there are none. own_batches: as of `ChunkedData`.
    """

    n: int
    batch: int | None
    own_batches: bool = False


def recipe_size(recipe: Recipe, key: str) -> Size:
    """Return how much the recipe builds, which is kept under `key`. Raises what `opened` raises."""
    samples = built_once(recipe, key)
    own_batches = isinstance(samples, Fetched) and samples.collate is not None
    return Size(len(samples), None if samples.sizes is None else max(samples.sizes), own_batches)


def spill(array: Array, folder: Path) -> NpyLeaf:
    """Keep an array as a .npy file in a folder that every worker sees."""
    path = folder / f"array-{uuid.uuid4().hex}.npy"
    save_whole(path, array)
    return NpyLeaf(str(path), array.shape)


def kept_leaf(array: Any, home: Home) -> Leaf:
    """Return an array where every task can read it."""
    if isinstance(array, Tensor):
        return home.keep(to_numpy(array))
    if isinstance(array, zarr.Array):
        shared = not isinstance(array.store, zarr.storage.MemoryStore)
        return ZarrLeaf(array) if shared else home.keep(np.asarray(array[:]))
    return home.keep(array)
