"""Pictures of a matrix that is too large to read: blocks of it, each as its entry of largest magnitude, sign kept.

A pyramid of two levels, `overview/coarse` (at most about 512 x 4096 cells, whatever the size of the matrix) and
`overview/fine` (blocks of 4 x 16, a 64th of the bytes). Each strip writes its own cells while its values are in memory,
so that no overview ever costs a second pass over the matrix. Matrices of up to 4 million entries have none: they are
read themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DIRECT_VALUES = 2**22  # 16 MiB of float32: what one picture may read of the matrix itself
COARSE_ROWS, COARSE_COLUMNS = 512, 4096
FINE_ROWS, FINE_COLUMNS = 4, 16


@dataclass(frozen=True)
class Level:
    """Divides the matrix into blocks of `rows` x `columns` entries.

    Blocks of columns begin again at each strip, so that strips stay apart.

    Attributes:
        name: The name of the array.
        rows: Test points per block.
        columns: Training points per block.
        strip: Training points per strip.
        n_test: Test points of the matrix.
        n_train: Training points of the matrix.
    """

    name: str
    rows: int
    columns: int
    strip: int
    n_test: int
    n_train: int

    @property
    def cells_per_strip(self) -> int:
        """Columns of cells that one strip fills."""
        return -(-self.strip // self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Cells [rows, columns]."""
        return -(-self.n_test // self.rows), -(-self.n_train // self.strip) * self.cells_per_strip

    def row_cells(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of cells that each row of the matrix lies in."""
        return rows // self.rows

    def column_cells(self, columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the column of cells that each column of the matrix lies in."""
        return columns // self.strip * self.cells_per_strip + columns % self.strip // self.columns


def levels(n_test: int, n_train: int, strip: int) -> list[Level]:
    """Return the levels that a matrix [n_test, n_train] is stored with, coarsest first; none for a small one."""
    if n_test * n_train <= DIRECT_VALUES:
        return []
    coarse = (-(-n_test // COARSE_ROWS), min(strip, -(-n_train // COARSE_COLUMNS)))
    fine = (min(FINE_ROWS, n_test), min(FINE_COLUMNS, strip))
    blocks = {"coarse": coarse, "fine": fine}
    if coarse[0] * coarse[1] <= fine[0] * fine[1]:
        del blocks["fine"]
    return [Level(name, *block, strip, n_test, n_train) for name, block in blocks.items()]


def extremes(
    values: NDArray[np.float32], row_starts: NDArray[np.int64], column_starts: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return of each block its entry of largest magnitude, with its sign; NaN where a block has only NaN.

    Args:
        values: [n, m].
        row_starts: Where the blocks of rows begin, strictly ascending from 0.
        column_starts: Where the blocks of columns begin, strictly ascending from 0.
    """
    high = np.fmax.reduceat(np.fmax.reduceat(values, row_starts, axis=0), column_starts, axis=1)
    low = np.fmin.reduceat(np.fmin.reduceat(values, row_starts, axis=0), column_starts, axis=1)
    return np.where(high >= -low, high, low)


def strip_cells(level: Level, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cells of one strip, [rows of cells, cells_per_strip]; a narrower last strip leaves NaN.

    Args:
        level: The level whose cells are made.
        values: The strip, [n_test, n].
    """
    cells = np.full((level.shape[0], level.cells_per_strip), np.nan, np.float32)
    columns = np.arange(0, values.shape[1], level.columns)
    cells[:, : columns.size] = extremes(values, np.arange(0, values.shape[0], level.rows), columns)
    return cells
