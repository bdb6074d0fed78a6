"""Which arrays a result has, and how they are cut into strips, shards and chunks. Arithmetic only, no disk.

A *strip* is all test points by one range of training points: one task, one shard, one file. Inner chunks (at most
32 x 2048 values, 256 kB) are what a reader fetches, so that a row, a column and a tile are all cheap to read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from distinfluence.errors import ChunkError, DistinfluenceError, IndexRangeError, SettingError, ShapeError
from distinfluence.store.format import overview

CHUNK_ROWS = 32
CHUNK_COLUMNS = 2048
CHUNK_VALUES = 2**20  # 4 MiB of float32: bounds an inner chunk when every entry is a whole input
FLOAT32_BITS = 23  # of a mantissa
MAX_POINTS = 2**31 - 1  # indices are int32, because browsers read int64 as BigInt


@dataclass(frozen=True)
class Layout:
    """The cut of a result [n_test, n_train, *input_shape] into strips.

    Args:
        n_test: Number of test points.
        n_train: Number of training points.
        strip: Training points per strip, at most n_train.
        input_shape: Shape of one training input for mode `perturbation`; empty for mode `up`.
        top_k: How many of the most helpful and of the most harmful training points are stored for each test point.
            Mode `up` only.
        mantissa_bits: Bits of the mantissa of a stored value; values with fewer than 23 are rounded and compressed.

    Raises:
        ShapeError: If a size is not a positive integer, or there are too many training points.
        ChunkError: If `strip` is not a positive integer up to n_train, or has no sensible chunks.
        SettingError: If `top_k` or `mantissa_bits` is out of range.

    >>> layout = Layout(n_test=100, n_train=10_000, strip=4096)
    >>> layout.n_strips, layout.chunk_shape, layout.shard_shape, layout.strip_slice(2)
    (3, (32, 2048), (128, 4096), slice(8192, 10000, None))
    """

    n_test: int
    n_train: int
    strip: int
    input_shape: tuple[int, ...] = ()
    top_k: int = 50
    mantissa_bits: int = FLOAT32_BITS

    def __post_init__(self) -> None:
        for name in ("n_test", "n_train"):
            object.__setattr__(self, name, _count(name, getattr(self, name), ShapeError))
        if self.n_train > MAX_POINTS:
            raise ShapeError(
                f"`n_train` must be at most {MAX_POINTS} (int32 indices), got {self.n_train}. Split the data."
            )
        object.__setattr__(self, "strip", _count("strip", self.strip, ChunkError))
        if self.strip > self.n_train:
            raise ChunkError(
                f"`strip` must be at most `n_train`={self.n_train}, got {self.strip}. Pass min(strip, n_train)."
            )
        object.__setattr__(self, "input_shape", _input_shape(self.input_shape))
        object.__setattr__(self, "top_k", _count("top_k", self.top_k, SettingError))
        bits = _count("mantissa_bits", self.mantissa_bits, SettingError)
        if bits > FLOAT32_BITS:
            raise SettingError(f"`mantissa_bits` must be at most {FLOAT32_BITS}, those of float32, got {bits}.")
        object.__setattr__(self, "mantissa_bits", bits)
        self._chunk_columns()

    @classmethod
    def from_attributes(cls, stored: Mapping[str, Any]) -> Layout:
        """Return the layout that `to_attributes` wrote.

        Args:
            stored: The fields as JSON values.

        Returns:
            The layout.
        """
        return cls(**{**stored, "input_shape": tuple(stored["input_shape"])})

    def to_attributes(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        Returns:
            Name → value.
        """
        return {**asdict(self), "input_shape": list(self.input_shape)}

    @property
    def n_strips(self) -> int:
        """Number of strips; the last one may be narrower."""
        return -(-self.n_train // self.strip)

    @property
    def k(self) -> int:
        """How many training points a stored ranking holds: min(top_k, n_train)."""
        return min(self.top_k, self.n_train)

    @property
    def strip_k(self) -> int:
        """How many training points one strip adds to a ranking at most: min(top_k, strip)."""
        return min(self.top_k, self.strip)

    @property
    def rounding_error(self) -> float:
        """Largest difference between a stored and the computed value, relative to the value."""
        return float(2.0 ** -(self.mantissa_bits + 1))

    @property
    def ranked(self) -> bool:
        """Whether there is one number per pair of points, so that training points can be ranked."""
        return not self.input_shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix: [n_test, n_train, *input_shape]."""
        return (self.n_test, self.n_train, *self.input_shape)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape that one read fetches: [rows, columns, *input_shape]."""
        return (self._chunk_rows(), self._chunk_columns(), *self.input_shape)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of one strip, its rows rounded up to whole chunks: [rows, strip, *input_shape]."""
        rows = self._chunk_rows()
        return (-(-self.n_test // rows) * rows, self.strip, *self.input_shape)

    @property
    def levels(self) -> list[overview.Level]:
        """The overviews that are stored with the matrix, coarsest first; none for a small one."""
        return overview.levels(self.n_test, self.n_train, self.strip) if self.ranked else []

    def strip_slice(self, i: int) -> slice:
        """Return the training points of a strip.

        Args:
            i: The strip, 0 ≤ i < n_strips.

        Returns:
            A range of training points.

        Raises:
            IndexRangeError: If there is no such strip.
        """
        i = whole_number("i", i)
        if not 0 <= i < self.n_strips:
            raise IndexRangeError(f"`i` must be a strip from 0 to {self.n_strips - 1}, got {i}. See `n_strips`.")
        return slice(i * self.strip, min((i + 1) * self.strip, self.n_train))

    def strip_shape(self, i: int) -> tuple[int, ...]:
        """Return the shape of a strip's values.

        Args:
            i: The strip, 0 ≤ i < n_strips.

        Returns:
            (n_test, n_i, *input_shape), where n_i is the number of training points of strip i.

        Raises:
            IndexRangeError: If there is no such strip.
        """
        columns = self.strip_slice(i)
        return (self.n_test, columns.stop - columns.start, *self.input_shape)

    def _chunk_rows(self) -> int:
        return min(CHUNK_ROWS, self.n_test, max(1, CHUNK_VALUES // math.prod(self.input_shape)))

    def _chunk_columns(self) -> int:
        """Return the largest divisor of the strip up to the limit; a strip without one worth a read stays whole."""
        limit = min(CHUNK_COLUMNS, max(1, CHUNK_VALUES // (self._chunk_rows() * math.prod(self.input_shape))))
        columns = next(c for c in range(min(limit, self.strip), 0, -1) if self.strip % c == 0)
        if columns >= limit // 8:
            return columns
        if self.strip <= 4 * limit:
            return self.strip
        below = self.strip // limit * limit
        raise ChunkError(
            f"`strip` must have a divisor from {limit // 8} to {limit} (an inner chunk's width) or be at most "
            f"{4 * limit}, got {self.strip}. A strip of {below} or {below + limit} would do, "
            f"as does any multiple of {limit}."
        )


class ArraySpec(NamedTuple):
    """One array of a result. `shards` is None for an array that is not sharded."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    dtype: str
    fill: float | int | bool
    dims: tuple[str, ...]


def array_specs(layout: Layout) -> list[ArraySpec]:
    """Return every array of a result with this layout.

    Chunks are cut so that no chunk ever has two writers: what a strip writes is cut by strip, the rest is written by
    the one process that drives the run.
    """
    inputs = tuple(f"input_{d}" for d in range(len(layout.input_shape)))
    nan, tests, trains, strips = float("nan"), (layout.n_test,), (layout.n_train,), (layout.n_strips,)
    matrix = ("test", "train", *inputs)
    specs = [
        ArraySpec("influences", layout.shape, layout.chunk_shape, layout.shard_shape, "float32", nan, matrix),
        ArraySpec("test_loss", tests, tests, None, "float32", nan, ("test",)),
        ArraySpec("test_gradient_norm", tests, tests, None, "float32", nan, ("test",)),
        ArraySpec("relative_residual", tests, tests, None, "float32", nan, ("test",)),
        ArraySpec("iterations", tests, tests, None, "int32", -1, ("test",)),
        ArraySpec("converged", tests, tests, None, "bool", False, ("test",)),
        ArraySpec("error_bound", tests, tests, None, "float32", nan, ("test",)),
        ArraySpec("train_loss", trains, (layout.strip,), None, "float32", nan, ("train",)),
        ArraySpec("train_gradient_norm", trains, (layout.strip,), None, "float32", nan, ("train",)),
        ArraySpec("self_influence", trains, (layout.strip,), None, "float32", nan, ("train",)),
        ArraySpec("self_influence_error", trains, (layout.strip,), None, "float32", nan, ("train",)),
        ArraySpec("strip_status", strips, (1,), None, "uint8", 0, ("strip",)),
    ]
    if layout.ranked:
        # rankings are read a test point at a time, so inner chunks hold few of them; a shard is still one file
        rows = layout.chunk_shape[0]
        whole = layout.shard_shape[0]
        rank, some, all_ = ((n, layout.k) for n in (layout.n_test, rows, whole))
        partial = (layout.n_strips, 2, layout.n_test, layout.strip_k)
        one, strip = (1, 2, rows, layout.strip_k), (1, 2, whole, layout.strip_k)
        for end in ("top", "bottom"):
            specs.append(ArraySpec(f"{end}_index", rank, some, all_, "int32", -1, ("test", "rank")))
            specs.append(ArraySpec(f"{end}_value", rank, some, all_, "float32", nan, ("test", "rank")))
        specs.append(ArraySpec("train_total", trains, (layout.strip,), None, "float32", nan, ("train",)))
        for level in layout.levels:
            cut, dims = (level.shape[0], level.cells_per_strip), ("test_block", "train_block")
            specs.append(ArraySpec(f"overview/{level.name}", level.shape, cut, None, "float32", nan, dims))
        by_strip = ("strip", "end", "test", "rank")
        specs.append(ArraySpec("strips/index", partial, one, strip, "int32", -1, by_strip))
        specs.append(ArraySpec("strips/value", partial, one, strip, "float32", nan, by_strip))
    return specs


def whole_number(name: str, value: object) -> int:
    """Return `value` as int; bools and floats are refused.

    Raises:
        SettingError: `value` is not a whole number.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise SettingError(f"`{name}` must be an integer, got {value!r}. Pass an int.") from None


def _count(name: str, value: object, error: type[DistinfluenceError]) -> int:
    try:
        count = whole_number(name, value)
    except SettingError as e:
        raise error(str(e)) from None
    if count < 1:
        raise error(f"`{name}` must be at least 1, got {count}. A result cannot be empty.")
    return count


def _input_shape(value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, tuple | list):
        raise ShapeError(
            f"`input_shape` must be a tuple of sizes, got {value!r}. Pass the shape of one training input."
        )
    return tuple(_count(f"input_shape[{d}]", size, ShapeError) for d, size in enumerate(value))
