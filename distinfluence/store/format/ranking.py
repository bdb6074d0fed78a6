"""The k most helpful and most harmful training points of each row, exact also among ties.

Value and index are packed into one sortable 64-bit key (the float's order above, the training index below), so keys are
unique: equal influences rank by ascending training index, however the matrix was cut into strips. O(n) per row.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import IndexRangeError, ShapeError
from distinfluence.store.format.html import table_as_html
from distinfluence.store.format.layout import Layout, whole_number

_KEYS_AT_ONCE = 2**21  # 16 MiB
_SIGN = np.uint32(0x8000_0000)


class Ranking(NamedTuple):
    """Points in order of influence.

    Attributes:
        indices: The points, [k]; [rows, k] within the store.
        values: Their influences, of the same shape.
    """

    indices: NDArray[np.int32]
    values: NDArray[np.float32]

    def _repr_html_(self) -> str:
        """Return a table of at most 100 lines, for notebooks."""
        n = self.indices.shape[0]
        columns = {"rank": range(1, n + 1), "point": self.indices.tolist(), "influence": self.values.tolist()}
        return table_as_html(f"{n} points by influence", {name: list(each)[:100] for name, each in columns.items()})


def most_helpful(values: NDArray[np.float32], indices: NDArray[np.int32], k: int) -> Ranking:
    """Return the k largest of each row, descending.

    Args:
        values: [rows, n], finite.
        indices: The training points, [n] or [rows, n].
        k: How many to keep of each row.
    """
    ranking = most_harmful(-values, indices, k)
    return Ranking(ranking.indices, -ranking.values + np.float32(0))


def most_harmful(values: NDArray[np.float32], indices: NDArray[np.int32], k: int) -> Ranking:
    """Return the k smallest of each row, ascending.

    Args:
        values: [rows, n], finite.
        indices: The training points, [n] or [rows, n].
        k: How many to keep of each row.
    """
    n_rows, n = values.shape
    k = min(k, n)
    keys = np.empty((n_rows, k), np.uint64)
    step = max(1, _KEYS_AT_ONCE // max(1, n))
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        packed = _pack(values[rows], indices if indices.ndim == 1 else indices[rows])
        if 0 < k < n:
            packed = np.partition(packed, k - 1, axis=1)[:, :k]
        keys[rows] = np.sort(packed, axis=1)[:, :k]
    return _unpack(keys)


def merge_helpful(a: Ranking, b: Ranking, k: int) -> Ranking:
    """Return the k largest of two rankings [rows, ·] of disjoint training points."""
    return most_helpful(np.hstack([a.values, b.values]), np.hstack([a.indices, b.indices]), k)


def merge_harmful(a: Ranking, b: Ranking, k: int) -> Ranking:
    """Return the k smallest of two rankings [rows, ·] of disjoint training points."""
    return most_harmful(np.hstack([a.values, b.values]), np.hstack([a.indices, b.indices]), k)


def empty_ranking(n_rows: int) -> Ranking:
    """Return a ranking [n_rows, 0] to merge into."""
    return Ranking(np.empty((n_rows, 0), np.int32), np.empty((n_rows, 0), np.float32))


def _pack(values: NDArray[np.float32], indices: NDArray[np.int32]) -> NDArray[np.uint64]:
    bits = (values + np.float32(0)).view(np.uint32)  # + 0: -0.0 ties with 0.0
    order = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return (order.astype(np.uint64) << np.uint64(32)) | indices.astype(np.uint64)


def _unpack(keys: NDArray[np.uint64]) -> Ranking:
    order = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(order & _SIGN, order ^ _SIGN, ~order)
    return Ranking((keys & np.uint64(0xFFFF_FFFF)).astype(np.int32), bits.view(np.float32))


End = Literal["top", "bottom"]


def require_ranked(layout: Layout, what: str) -> None:
    """Pass for one number per pair of points.

    Raises:
        ShapeError: The result holds influences of inputs.
    """
    if not layout.ranked:
        raise ShapeError(
            f"`{what}` wants one number per pair of points, got perturbation influences of inputs "
            f"{layout.input_shape}. Reduce them first, for example by their norm over the input."
        )


def checked_index(name: str, index: int, n: int) -> int:
    """Return `index` from 0 to n - 1, negative ones counted from the end.

    Raises:
        IndexRangeError: `index` lies outside the axis.
    """
    index = whole_number(name, index)
    if not -n <= index < n:
        axis = name.partition("_")[0]
        raise IndexRangeError(f"`{name}` must be from {-n} to {n - 1}, got {index}. There are {n} {axis} points.")
    return index % n


def is_ranking(ranking: Ranking, columns: slice) -> bool:
    """Whether it names training points of `columns` only, with finite influences: what a missing chunk does not."""
    inside = (ranking.indices >= columns.start) & (ranking.indices < columns.stop)
    return bool(inside.all() and np.isfinite(ranking.values).all())
