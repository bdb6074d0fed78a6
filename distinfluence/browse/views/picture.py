"""A window of the matrix as a picture of any size, from as few bytes as that takes.

Up to 4 million entries (16 MiB) are read themselves; larger windows come from the overviews that the strips wrote. A
cell of the picture is the entry of largest magnitude among those that it covers, sign kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import CorruptStoreError, IndexRangeError, SettingError
from distinfluence.store import InfluenceResult
from distinfluence.store.format.overview import DIRECT_VALUES, Level, strip_cells

ORDERED_VALUES = 2**24  # 64 MiB of float32: the largest matrix that is held in memory to be shown in another order
MAX_SIDE = 4096

Permutation = NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """Holds a window of the matrix as cells.

    Attributes:
        values: [h, w], NaN where strips are missing, infinite where they are damaged.
        block: How many rows and columns of the matrix a stored cell stands for, (1, 1) if the entries were read.
        damaged: Strips within the window whose bytes are not those that were written.
    """

    values: NDArray[np.float32]
    block: tuple[int, int]
    damaged: list[int]


class Pictures:
    """Makes pictures of a result; keeps what is needed for other orders, and overviews that are not stored."""

    def __init__(self, result: InfluenceResult, progress: Callable[[float], None] = lambda share: None) -> None:
        self._result = result
        self._progress = progress
        self._matrix: NDArray[np.float32] | None = None
        self._made: dict[str, NDArray[np.float32]] = {}

    @property
    def can_be_ordered(self) -> bool:
        """Whether rows and columns can be shown in another order than that of the disk."""
        n_test, n_train = self._result.shape[:2]
        return self._result.layout.ranked and n_test * n_train <= ORDERED_VALUES

    def picture(
        self,
        rows: slice,
        columns: slice,
        height: int,
        width: int,
        orders: tuple[Permutation | None, Permutation | None] = (None, None),
    ) -> Picture:
        """Return the window as at most [height, width] cells.

        Args:
            rows: The test points, by their places.
            columns: The training points, by their places.
            height: The largest number of cells down.
            width: The largest number of cells across.
            orders: Which test and training point stands at each place; None for their own order.

        Raises:
            IndexRangeError: The window lies outside the matrix.
            SettingError: `height` or `width` is outside its range, or the matrix is too large for `orders`.
        """
        n_test, n_train = self._result.shape[:2]
        check_window("rows", rows, n_test)
        check_window("columns", columns, n_train)
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise SettingError(f"`height` and `width` must be from 1 to {MAX_SIDE}, got {height} and {width}.")
        row_edges, column_edges = _edges(rows, height), _edges(columns, width)
        if orders[0] is not None or orders[1] is not None:
            values, damaged = self.ordered(rows, columns, orders)
            return Picture(_reduced(values, row_edges - rows.start, column_edges - columns.start), (1, 1), damaged)
        if (rows.stop - rows.start) * (columns.stop - columns.start) <= DIRECT_VALUES or not self._result.layout.levels:
            values, damaged = self._read(rows, columns)
            return Picture(_reduced(values, row_edges - rows.start, column_edges - columns.start), (1, 1), damaged)
        return self._from_level(
            self._level(rows, columns, row_edges.size - 1, column_edges.size - 1), row_edges, column_edges
        )

    def ordered(
        self, rows: slice, columns: slice, orders: tuple[Permutation | None, Permutation | None]
    ) -> tuple[NDArray[np.float32], list[int]]:
        """Return the entries of a window in these orders, and the damaged strips."""
        if orders[0] is None and orders[1] is None:  # arrays are not to be compared
            return self._read(rows, columns)
        n_test, n_train = self._result.shape[:2]
        if not self.can_be_ordered:
            raise SettingError(
                f"another order needs the whole matrix in memory, {n_test} x {n_train} is more than the "
                f"{ORDERED_VALUES} entries that are held. Look at it in the order of the disk."
            )
        if self._matrix is None or not self._result.complete:
            self._matrix, self._damaged = self._read(slice(0, n_test), slice(0, n_train))
        picked = [np.arange(n) if order is None else order for n, order in zip((n_test, n_train), orders, strict=True)]
        return self._matrix[np.ix_(picked[0][rows], picked[1][columns])], self._damaged

    def _read(self, rows: slice, columns: slice) -> tuple[NDArray[np.float32], list[int]]:
        try:
            return self._result[rows, columns], []
        except CorruptStoreError:
            pass
        values = np.full((rows.stop - rows.start, columns.stop - columns.start), np.nan, np.float32)
        layout, damaged = self._result.layout, []
        for i in range(columns.start // layout.strip, -(-columns.stop // layout.strip)):
            own = layout.strip_slice(i)
            part = slice(max(own.start, columns.start), min(own.stop, columns.stop))
            place = slice(part.start - columns.start, part.stop - columns.start)
            try:
                values[:, place] = self._result[rows, part]
            except CorruptStoreError:
                values[:, place] = np.inf
                damaged.append(i)
        return values, damaged

    def _level(self, rows: slice, columns: slice, height: int, width: int) -> Level:
        """Return the coarsest level that is fine enough for the picture, or the finest that can be read at once."""
        best = self._result.layout.levels[0]
        for level in self._result.layout.levels:
            best_is_fine = (
                best.rows * height <= rows.stop - rows.start and best.columns * width <= columns.stop - columns.start
            )
            cells = level.shape[0] * (columns.stop - columns.start) / level.columns
            if not best_is_fine and cells <= DIRECT_VALUES:
                best = level
        return best

    def _from_level(self, level: Level, row_edges: Permutation, column_edges: Permutation) -> Picture:
        first_row, last_row = level.row_cells(row_edges[:-1]), level.row_cells(row_edges[1:] - 1)
        first, last = level.column_cells(column_edges[:-1]), level.column_cells(column_edges[1:] - 1)
        window = slice(int(first[0]), int(last[-1]) + 1)
        cells, damaged = self._cells(level, window)
        values = _ranges(_ranges(cells, first_row, last_row + 1, 0), first - window.start, last + 1 - window.start, 1)
        return Picture(values, (level.rows, level.columns), damaged)

    def _cells(self, level: Level, window: slice) -> tuple[NDArray[np.float32], list[int]]:
        try:
            return self._result.overview(level.name, window), []
        except CorruptStoreError as error:
            if "is missing" in str(error):
                return self._make(level)[:, window], []
        cells = np.full((level.shape[0], window.stop - window.start), np.inf, np.float32)
        damaged = []
        for i in range(window.start // level.cells_per_strip, -(-window.stop // level.cells_per_strip)):
            start = max(window.start, i * level.cells_per_strip)
            stop = min(window.stop, (i + 1) * level.cells_per_strip)
            try:
                cells[:, start - window.start : stop - window.start] = self._result.overview(
                    level.name, slice(start, stop)
                )
            except CorruptStoreError:
                damaged.append(i)
        return cells, damaged

    def _make(self, level: Level) -> NDArray[np.float32]:
        """Make the overview of a result that has none, in memory: every strip is read once."""
        if level.name not in self._made:
            made = {each.name: np.full(each.shape, np.nan, np.float32) for each in self._result.layout.levels}
            for i in np.flatnonzero(self._result.finished_strips()).tolist():
                columns = self._result.layout.strip_slice(i)
                values, _ = self._read(slice(0, self._result.shape[0]), columns)
                for each in self._result.layout.levels:
                    first = i * each.cells_per_strip
                    made[each.name][:, first : first + each.cells_per_strip] = strip_cells(each, values)
                self._progress((i + 1) / self._result.layout.n_strips)
            self._made = made
        return self._made[level.name]


def packed(values: NDArray[np.float32]) -> tuple[NDArray[np.float16], float]:
    """Cells in half precision (3 digits, which is what a colour and its text show), little-endian, and their scale.

    The scale is the median magnitude, so that neither few large cells nor many zeros cost digits. NaN and infinite
    cells stay what they are; finite ones beyond 60,000 times the scale are cut there.
    """
    known = np.isfinite(values)
    magnitudes = np.abs(values[known & (values != 0)], dtype=np.float64)
    scale = float(np.median(magnitudes)) if magnitudes.size else 1.0
    shares = np.where(known, np.clip(values.astype(np.float64) / scale, -6e4, 6e4), values)
    return shares.astype("<f2"), scale


def cluster_order(values: NDArray[np.float32]) -> Permutation:
    """Return an order that puts rows of one direction together: by angle in the plane of the two main directions.

    Args:
        values: [n, m]; entries that are not finite count as 0. Costs O(n m min(n, m)).
    """
    known = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
    norms = np.linalg.norm(known, axis=1, keepdims=True)
    known /= np.where(norms > 0, norms, 1.0)
    wide = known.shape[0] > known.shape[1]
    squares, vectors = np.linalg.eigh(known.T @ known if wide else known @ known.T)
    plane = known @ vectors[:, -2:] if wide else vectors[:, -2:] * np.sqrt(np.maximum(squares[-2:], 0.0))
    if plane.shape[1] < 2:
        return np.arange(values.shape[0])
    order: Permutation = np.argsort(np.arctan2(plane[:, 0], plane[:, 1]), kind="stable")
    return order


def orders_of(known: Mapping[str, NDArray[np.generic] | None]) -> dict[str, Permutation]:
    """Return by name the order by these values: labels ascending, all else with the largest first; NaN last."""
    found = {}
    for name, values in known.items():
        if values is None:
            continue
        numbers = np.asarray(values, dtype=np.float64)
        if np.isnan(numbers).all():
            continue
        found[name] = np.argsort(numbers if name == "class" else -numbers, kind="stable")
    return found


def check_window(name: str, window: slice, n: int) -> None:
    """Pass for a range within 0 to n that is not empty.

    Raises:
        IndexRangeError: The range is empty or not within 0 to n.
    """
    if not 0 <= window.start < window.stop <= n:
        raise IndexRangeError(f"`{name}` must be a range within 0:{n}, got {window.start}:{window.stop}.")


def _edges(window: slice, n_cells: int) -> Permutation:
    n = window.stop - window.start
    cells = min(n_cells, n)
    edges: Permutation = window.start + np.arange(cells + 1, dtype=np.int64) * n // cells
    return edges


def _reduced(values: NDArray[np.float32], row_edges: Permutation, column_edges: Permutation) -> NDArray[np.float32]:
    if values.shape == (row_edges.size - 1, column_edges.size - 1):
        return values
    return _ranges(_ranges(values, row_edges[:-1], row_edges[1:], 0), column_edges[:-1], column_edges[1:], 1)


def _ranges(values: NDArray[np.float32], starts: Permutation, stops: Permutation, axis: int) -> NDArray[np.float32]:
    """Return for each range (start < stop) of an axis its entry of largest magnitude; ranges may overlap."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, 1)  # a stop at the end is an index too
    padded = np.pad(values, padding, constant_values=np.nan)
    between = np.stack([starts, stops], axis=1).ravel()
    keep = (slice(None),) * axis + (slice(None, None, 2),)
    high, low = (ends.reduceat(padded, between, axis=axis)[keep] for ends in (np.fmax, np.fmin))
    return np.where(high >= -low, high, low)
