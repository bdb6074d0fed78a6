"""Reading a result: lazy, read-only, also while the run is still writing. Nothing is loaded until it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from distinfluence.errors import (
    CorruptStoreError,
    IncompleteResultError,
    IndexRangeError,
    MissingDependencyError,
    SettingError,
    ShapeError,
)
from distinfluence.store.folder import local_path, read_attributes, surfaced_errors
from distinfluence.store.layout import Layout, whole_number
from distinfluence.store.ranking import Ranking, most_harmful, most_helpful
from distinfluence.store.writer import COMPLETE

if TYPE_CHECKING:
    import xarray


def open_influences(path: str | os.PathLike[str]) -> InfluenceResult:
    """Open the result at `path` for reading. Raises StoreNotFoundError, ForeignStoreError, StoreError (too new)."""
    return InfluenceResult(local_path(path))


class InfluenceResult:
    """The influences of training points on test points, on disk. Rows are test points, columns training points.

    Positive: the training point helps. `provenance` and `complete` are as of opening; all else is read when asked for.
    Indices count as in NumPy, so -1 is the last point.
    """

    def __init__(self, path: Path) -> None:
        attributes = read_attributes(path)
        self.path = path
        self.layout = Layout.from_attributes(attributes["layout"])
        self.provenance: Mapping[str, Any] = MappingProxyType(attributes)
        with surfaced_errors("open", path):
            self._group = zarr.open_group(str(path), mode="r", use_consolidated=False)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (open_influences, (str(self.path),))

    def __repr__(self) -> str:
        n_test, n_train = self.shape[:2]
        done = self.layout.n_strips - self.n_missing
        state = "complete" if self.complete else f"running, {done} of {self.layout.n_strips} strips"
        residual, converged = self.relative_residual, int(self.converged.sum())
        worst = f"{np.nanmax(residual):.2g}" if not np.isnan(residual).all() else "not recorded"
        return (
            f"<InfluenceResult {n_test} test x {n_train} train{' x input ' if self.layout.input_shape else ''}"
            f"{self.layout.input_shape or ''}, {_method(self.provenance)}, {state}, {converged} of {n_test} rows "
            f"converged, worst relative residual {worst}, {str(self.path)!r}>"
        )

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """A tile, as `result[i]`, `result[i, a:b]`; read from disk, NaN where strips are missing."""
        return self._read("influences", key)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_test, n_train, *input_shape)."""
        return self.layout.shape

    @property
    def influences(self) -> zarr.Array[Any]:
        """[n_test, n_train, *input_shape] float32, as a zarr array; NaN where strips are missing."""
        return self._array("influences")

    @property
    def complete(self) -> bool:
        """Whether the run had finished when the result was opened."""
        return bool(self.provenance["state"] == COMPLETE)

    @property
    def n_missing(self) -> int:
        """Number of strips that are not written yet."""
        return self.layout.n_strips - int(self._finished_strips().sum())

    @property
    def progress(self) -> float:
        """Fraction of strips that are written, 0 to 1."""
        return 1.0 - self.n_missing / self.layout.n_strips

    @property
    def test_loss(self) -> NDArray[np.float32]:
        """[n_test], NaN where not recorded."""
        return self._read("test_loss")

    @property
    def test_gradient_norm(self) -> NDArray[np.float32]:
        """[n_test], NaN where not recorded."""
        return self._read("test_gradient_norm")

    @property
    def relative_residual(self) -> NDArray[np.float32]:
        """[n_test], relative to the norm of the right-hand side; NaN where not recorded."""
        return self._read("relative_residual")

    @property
    def iterations(self) -> NDArray[np.int32]:
        """[n_test], -1 where not recorded."""
        return self._read("iterations")

    @property
    def converged(self) -> NDArray[np.bool_]:
        """[n_test], False where not recorded."""
        return self._read("converged")

    @property
    def error_bound(self) -> NDArray[np.float32]:
        """[n_test], c_i with |stored − exact influence| ≤ c_i · `train_gradient_norm`_j; NaN where there is none.

        `provenance["error_bound"]` says whether it is "rigorous" or "heuristic" (it then rests on an estimate of the
        smallest eigenvalue).
        """
        return self._read("error_bound")

    @property
    def train_loss(self) -> NDArray[np.float32]:
        """[n_train], NaN where not recorded."""
        return self._read("train_loss")

    @property
    def train_gradient_norm(self) -> NDArray[np.float32]:
        """[n_train], NaN where not recorded."""
        return self._read("train_gradient_norm")

    def top(self, test_index: int, k: int | None = None, *, partial: bool = False) -> Ranking:
        """The k most helpful training points of a test point, largest influence first; ties by training index.

        `k`: all that are stored if None; more than n_train gives all. Beyond what is stored, the row is read.
        `partial`: rank over the strips that are there, if the result is incomplete. Raises IndexRangeError,
        IncompleteResultError, SettingError, and ShapeError for a result of mode `perturbation`.
        """
        return self._rank("top", test_index, k, partial)

    def bottom(self, test_index: int, k: int | None = None, *, partial: bool = False) -> Ranking:
        """The k most harmful training points of a test point, smallest influence first. Otherwise as `top`."""
        return self._rank("bottom", test_index, k, partial)

    def damaged_strips(self) -> list[int]:
        """The marked strips whose bytes are not those that were written. Reads the whole result, a strip at a time."""
        damaged = []
        for i in np.flatnonzero(self._finished_strips()):
            try:
                if not np.isfinite(self._read("influences", (slice(None), self.layout.strip_slice(int(i))))).all():
                    damaged.append(int(i))
            except CorruptStoreError:
                damaged.append(int(i))
        return damaged

    def to_xarray(self) -> xarray.Dataset:
        """The result as a lazy xarray Dataset with dimensions test and train. Raises MissingDependencyError."""
        try:
            import xarray
        except ImportError as error:
            raise MissingDependencyError(
                "`to_xarray` needs xarray, which is not installed. Run pip install 'distinfluence[browse]'."
            ) from error
        with surfaced_errors("open", self.path):
            dataset: xarray.Dataset = xarray.open_zarr(str(self.path), consolidated=False, chunks=None)
        return dataset

    def _array(self, name: str) -> zarr.Array[Any]:
        with surfaced_errors("read", self.path):
            array = self._group[name]
        if not isinstance(array, zarr.Array):
            raise CorruptStoreError(f"`{name}` of {self.path} must be an array, got a group. Compute the result again.")
        return array

    def _read(self, name: str, key: Any = slice(None)) -> NDArray[Any]:
        array = self._array(name)
        with surfaced_errors("read", self.path):
            return np.asarray(array[key])

    def _finished_strips(self) -> NDArray[np.bool_]:
        finished: NDArray[np.bool_] = self._read("strip_status") == 1
        return finished

    def _rank(self, end: str, test_index: int, k: int | None, partial: bool) -> Ranking:
        if not self.layout.ranked:
            raise ShapeError(
                f"`{end}` ranks one number per training point, got perturbation influences of inputs "
                f"{self.layout.input_shape}. Reduce them first, for example by their norm over the input."
            )
        row = self._row_index(test_index)
        k = self.layout.k if k is None else whole_number("k", k)
        if k < 1:
            raise SettingError(f"`k` must be at least 1, got {k}. Leave it out for what is stored ({self.layout.k}).")
        if self.complete and k <= self.layout.k:
            return Ranking(self._read(f"{end}_index", row)[:k], self._read(f"{end}_value", row)[:k])
        if not self.complete and not partial:
            raise IncompleteResultError(
                f"`{end}` needs a complete result, got {self.layout.n_strips - self.n_missing} of "
                f"{self.layout.n_strips} strips. Resume the run and finish it, or pass partial=True to rank the "
                "finished strips."
            )
        return self._rank_row(end, row, k)

    def _rank_row(self, end: str, row: int, k: int) -> Ranking:
        # The marks are read before the row: a strip that is marked then has its values in the row read afterwards.
        points = np.flatnonzero(np.repeat(self._finished_strips(), self.layout.strip)[: self.layout.n_train])
        values = self._read("influences", row)[points]
        if not np.isfinite(values).all():
            raise CorruptStoreError(
                f"test point {row} of {self.path} has missing values in finished strips. See "
                "`damaged_strips`, and `reopen` those."
            )
        rank = most_helpful if end == "top" else most_harmful
        ranking = rank(values[np.newaxis], points.astype(np.int32), k)
        return Ranking(ranking.indices[0], ranking.values[0])

    def _row_index(self, test_index: int) -> int:
        index, n_test = whole_number("test_index", test_index), self.layout.n_test
        if not -n_test <= index < n_test:
            raise IndexRangeError(
                f"`test_index` must be from {-n_test} to {n_test - 1}, got {index}. There are {n_test} test points."
            )
        return index % n_test


def _method(provenance: Mapping[str, Any]) -> str:
    solver = provenance.get("solver")
    if isinstance(solver, Mapping):
        solver = solver.get("name", solver.get("method"))
    return solver if isinstance(solver, str) else "method not recorded"
