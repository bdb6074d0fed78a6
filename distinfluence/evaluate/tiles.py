"""Scores that may be larger than memory, read a block of columns or of rows at a time."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import IncompleteResultError, IndexRangeError, NonFiniteError, ShapeError
from distinfluence.store import InfluenceResult

BLOCK = 2**22  # Scores that are read at a time, unless the chunks on the disk are larger: 32 MB in float64.


class SupportsTiles(Protocol):
    """A matrix that is read by slices, such as a zarr, dask or HDF5 array, a tensor, or an `InfluenceResult`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""

    def __getitem__(self, key: Any, /) -> Any:
        """Return a tile, as NumPy takes its key."""


Scores = ArrayLike | SupportsTiles


class ScoreMatrix:
    """Scores [n_test, n_train], wherever they are. Each block that is read is checked for NaN.

    Attributes:
        name: Name of the argument, for messages.
        n_test: Number of test points.
        n_train: Number of training points.
    """

    def __init__(self, scores: Scores, name: str) -> None:
        self._scores = _readable(scores)
        shape = tuple(self._scores.shape)
        if len(shape) != 2 or 0 in shape:
            raise ShapeError(
                f"`{name}` must be [n_test, n_train], got {list(shape)}. Pass one row of scores for each test point."
            )
        if isinstance(scores, InfluenceResult) and scores.n_missing:
            raise IncompleteResultError(
                f"`{name}` must be a complete result, {scores.n_missing} of {scores.layout.n_strips} strips of "
                f"{scores.path} are missing. Finish the run."
            )
        self.name = name
        self.n_test, self.n_train = shape

    def by_columns(self) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Read blocks of whole chunks of columns.

        Yields:
            The columns, and their scores [n_test, n].
        """
        for columns in blocks(self.n_train, self.n_test, self.chunk(1)):
            yield columns, self._read((slice(None), columns))

    def rows(self, rows: slice) -> NDArray[Any]:
        """Read some rows.

        Args:
            rows: The rows.

        Returns:
            Their scores, [n, n_train].
        """
        return self._read((rows, slice(None)))

    def totals(self, subsets: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Add up the scores of the training points of each subset.

        Args:
            subsets: Which training points are in, [s, n_train].

        Returns:
            The sums, [n_test, s].
        """
        sums = np.zeros((self.n_test, len(subsets)))
        for columns, values in self.by_columns():
            members = subsets[:, columns].T.astype(np.float64)
            for rows in blocks(self.n_test, members.shape[0], 1):  # widened to float64 a panel at a time
                sums[rows] += values[rows].astype(np.float64) @ members
        return sums

    def _read(self, key: tuple[slice, slice]) -> NDArray[Any]:
        values = np.asarray(self._scores[key])
        if values.dtype.kind != "f":
            values = values.astype(np.float64)
        if not np.isfinite(values).all():
            raise NonFiniteError(f"`{self.name}` must be finite, got NaN or infinity. Look at the run it comes from.")
        return values

    def chunk(self, axis: int) -> int:
        """Return how many rows (axis 0) or columns (axis 1) are read at once anyway."""
        if isinstance(self._scores, InfluenceResult):
            layout = self._scores.layout
            return layout.chunk_shape[0] if axis == 0 else layout.strip
        chunks = getattr(self._scores, "chunks", None)
        size = chunks[axis] if isinstance(chunks, tuple) and len(chunks) == 2 else 1
        return max(1, max(size) if isinstance(size, tuple) else int(size))  # dask lists the chunks of an axis


def _readable(scores: Scores) -> Any:
    """Return what is read a chunk at a time as it is, and all else, which is in memory or mapped to it, as an array."""
    return scores if isinstance(scores, InfluenceResult) or hasattr(scores, "chunks") else np.asarray(scores)


def blocks(n: int, across: int, chunk: int) -> Iterator[slice]:
    """Cut n rows (or columns) of this many numbers into blocks of whole chunks."""
    size = chunk * max(1, BLOCK // (across * chunk))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def row_panels(matrices: Sequence[ScoreMatrix]) -> Iterator[tuple[slice, list[NDArray[Any]]]]:
    """Read the same rows of matrices of one shape, each chunk once.

    Args:
        matrices: The matrices.

    Yields:
        Some rows, as few as can be sorted in little memory, and the scores of each matrix, [n, n_train].
    """
    n_test, n_train = matrices[0].n_test, matrices[0].n_train
    across = n_train * len(matrices)
    for rows in blocks(n_test, across, max(matrix.chunk(0) for matrix in matrices)):
        read = [matrix.rows(rows) for matrix in matrices]
        for panel in blocks(rows.stop - rows.start, across, 1):
            yield slice(rows.start + panel.start, rows.start + panel.stop), [values[panel] for values in read]


def checked_points(name: str, points: ArrayLike, n: int) -> NDArray[np.int64]:
    """Return indices of points, each once and ascending, of n points.

    Args:
        name: Name of the argument.
        points: The indices, from 0.
        n: How many points there are.

    Returns:
        The indices, [m].

    Raises:
        IndexRangeError: If an index is none of a point, or not a whole number.
    """
    index = np.atleast_1d(np.asarray(points))
    if index.size == 0:
        return np.empty(0, dtype=np.int64)
    if index.ndim != 1 or index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= n:
        raise IndexRangeError(
            f"`{name}` must be whole numbers from 0 to {n - 1}, one for each point, got {index.dtype} "
            f"{list(index.shape)} with {index.ravel()[:5].tolist()}."
        )
    return np.unique(index).astype(np.int64)
