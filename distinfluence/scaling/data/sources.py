"""Where the samples of a chunk are: files, zarr arrays, data sets that each process builds for itself.

A `ChunkSource` is a few hundred bytes that travel with a task; `load` reads its samples where the task runs.
"""

import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import cloudpickle
import numpy as np
import zarr
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from distinfluence.errors import DtypeError, EmptyDataError, ShapeError
from distinfluence.influence.arrays import Array, ArrayBatch, to_numpy, to_numpy_batch
from distinfluence.memory import process_bytes
from distinfluence.model.batch import as_batch
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

    def length(self, recipe: Recipe, key: str) -> int:
        """Return the length of what the recipe builds, found where tasks run; `key`: under which it is kept there."""

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

    def length(self, recipe: Recipe, key: str) -> int:
        """Build it here."""
        return recipe_length(recipe, key)


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
        return self._read(self.leaves)

    def _read(self, tree: LeafTree) -> ArrayBatch:
        if isinstance(tree, dict):
            return {name: self._read(leaf) for name, leaf in tree.items()}
        if isinstance(tree, tuple):
            return tuple(self._read(leaf) for leaf in tree)
        return tree.read(self.start, self.stop)


@dataclass(frozen=True)
class DatasetSource(ChunkSource):
    """A range of samples of a map-style data set, or of arrays, that each process builds once for itself."""

    recipe: Recipe | bytes
    collate: bytes | None
    start: int
    stop: int
    key: str
    sha256: str = ""

    def load(self) -> ArrayBatch:
        """Collate the samples, or slice the arrays."""
        data = built_once(self.recipe, self.key.partition("/")[0])
        if not isinstance(data, Dataset):
            return ArraySource(leaf_tree(data, InThisProcess(), "data"), self.start, self.stop, self.key).load()
        collate = default_collate if self.collate is None else cloudpickle.loads(self.collate)
        return to_numpy_batch(as_batch(collate([data[index] for index in range(self.start, self.stop)])))


_data_sets: OrderedDict[str, Any] = OrderedDict()
_grown: dict[str, int] = {}  # by how much the process did when it built them


def built_once(recipe: Recipe | bytes, key: str) -> Any:
    """Return what the recipe (or the pickled data set) builds, kept under `key`."""
    if key not in _data_sets:
        before = process_bytes()
        _data_sets[key] = cloudpickle.loads(recipe) if isinstance(recipe, bytes) else recipe.build()
        _grown[key] = max(0, process_bytes() - before)
        while len(_data_sets) > KEPT_DATA_SETS:
            oldest, _ = _data_sets.popitem(last=False)
            del _grown[oldest]
    return _data_sets[key]


def built_bytes(source: "ChunkSource") -> int:
    """Return about how much memory this process took to build the data set of a chunk that it has loaded."""
    return _grown.get(source.key.partition("/")[0], 0) if isinstance(source, DatasetSource) else 0


def recipe_length(recipe: Recipe, key: str) -> int:
    """Return the number of samples of what the recipe builds, which is kept under `key`.

    Raises:
        DtypeError: The recipe builds neither a data set nor arrays.
    """
    built = built_once(recipe, key)
    if isinstance(built, IterableDataset) or not isinstance(built, (Dataset, Tensor, np.ndarray, Mapping, Sequence)):
        raise DtypeError(
            f"`{recipe.target}` must return a map-style data set, or arrays, got {type(built).__name__}. "
            "Give the data set `__len__` and `__getitem__`."
        )
    if isinstance(built, Dataset):
        return len(built)  # type: ignore[arg-type]
    return common_length(leaf_tree(built, InThisProcess(), "data"))


def spill(array: Array, folder: Path) -> NpyLeaf:
    """Keep an array as a .npy file in a folder that every worker sees."""
    path = folder / f"array-{uuid.uuid4().hex}.npy"
    save_whole(path, array)
    return NpyLeaf(str(path), array.shape)


def leaf_tree(data: object, home: Home, name: str) -> LeafTree:
    """Return the arrays of a data set where every task can read them, in the form of the data."""
    if isinstance(data, Mapping):
        return {str(key): leaf_tree(value, home, f"{name}[{key!r}]") for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return tuple(leaf_tree(value, home, f"{name}[{index}]") for index, value in enumerate(data))
    if isinstance(data, Tensor):
        return home.keep(to_numpy(data))
    if isinstance(data, np.ndarray):
        return home.keep(data)
    if isinstance(data, zarr.Array):
        shared = not isinstance(data.store, zarr.storage.MemoryStore)
        return ZarrLeaf(data) if shared else home.keep(np.asarray(data[:]))
    raise DtypeError(
        f"`{name}` must be a tensor, a NumPy, zarr or dask array, a data set, a DataLoader or a `Recipe`, got "
        f"{type(data).__name__}. Convert it to an array first."
    )


def common_length(tree: LeafTree) -> int:
    """Return the number of samples. Raises ShapeError where arrays disagree, EmptyDataError where there are none."""
    lengths = dict(leaf_lengths(tree, "data"))
    if len(set(lengths.values())) > 1:
        raise ShapeError(f"`x` and `y` must have as many samples, got {lengths}. Pass inputs and targets that match.")
    if not lengths:
        raise EmptyDataError("`x` must hold at least one array, got none. Pass the samples.")
    return next(iter(lengths.values()))


def leaf_lengths(tree: LeafTree, name: str) -> list[tuple[str, int]]:
    """Return the length of each array, with the name by which a user would reach it."""
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in leaf_lengths(value, f"{name}[{key!r}]")]
    if isinstance(tree, tuple):
        return [pair for index, value in enumerate(tree) for pair in leaf_lengths(value, f"{name}[{index}]")]
    if not tree.shape:
        raise ShapeError(f"`{name}` must have the samples along its first dimension, got a scalar.")
    return [(name, tree.shape[0])]
