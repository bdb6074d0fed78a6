"""Reading a result: lazy, read-only, also while the run is still writing. Nothing is loaded until it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import (
    MissingDependencyError,
)
from distinfluence.store.format.folder import place_of
from distinfluence.store.format.ranking import Ranking, checked_index, require_ranked
from distinfluence.store.read import analysis
from distinfluence.store.read.arrays import ResultArrays
from distinfluence.store.read.contributions import Contributions, read_contributions
from distinfluence.store.read.facts import result_as_html
from distinfluence.store.read.row_ranking import rank_row
from distinfluence.store.read.tables import ranking_table
from distinfluence.store.read.xarray_view import Chunks, as_dataset, as_datatree

if TYPE_CHECKING:
    import pandas
    import xarray


def open_influences(path: str | os.PathLike[str]) -> InfluenceResult:
    """Open the result at `path` for reading: a folder, or a URL that fsspec knows (s3://…, https://…).

    Raises StoreNotFoundError, ForeignStoreError, StoreError (too new, or no answer), MissingDependencyError.
    """
    return InfluenceResult(place_of(path))


class InfluenceResult(ResultArrays):
    """The influences of training points on test points, on disk. Rows are test points, columns training points.

    Positive: the training point helps. `provenance` and `complete` are as of opening; all else is read when asked for.
    Indices count as in NumPy, so -1 is the last point.
    """

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

    def _repr_html_(self) -> str:
        """What the result is and what it cost, for notebooks."""
        return result_as_html(self)

    @property
    def influences(self) -> zarr.Array[Any]:
        """[n_test, n_train, *input_shape] float32, as a zarr array; NaN where strips are missing."""
        return self._array("influences")

    @property
    def progress(self) -> float:
        """Fraction of strips that are written, 0 to 1."""
        return 1.0 - self.n_missing / self.layout.n_strips

    @property
    def quarantined(self) -> dict[int, str]:
        """Strips that the run set apart because they could not be made, with the reason; as of opening."""
        noted = self.provenance.get("quarantined")
        if not isinstance(noted, Mapping):
            return {}
        return {int(i): str(reason) for i, reason in noted.items() if str(i).isdecimal()}

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from the disk through this object."""
        return self._store.bytes_read

    @property
    def test_loss(self) -> NDArray[np.float32]:
        """[n_test], NaN where not recorded."""
        return self.read("test_loss")

    @property
    def test_gradient_norm(self) -> NDArray[np.float32]:
        """[n_test], NaN where not recorded."""
        return self.read("test_gradient_norm")

    @property
    def relative_residual(self) -> NDArray[np.float32]:
        """[n_test], relative to the norm of the right-hand side; NaN where not recorded."""
        return self.read("relative_residual")

    @property
    def iterations(self) -> NDArray[np.int32]:
        """[n_test], -1 where not recorded."""
        return self.read("iterations")

    @property
    def converged(self) -> NDArray[np.bool_]:
        """[n_test], False where not recorded."""
        return self.read("converged")

    @property
    def error_bound(self) -> NDArray[np.float32]:
        """[n_test], c_i with |stored − exact influence| ≤ c_i · `train_gradient_norm`_j; NaN where there is none.

        `provenance["error_bound"]` says whether it is "rigorous" or "heuristic" (it then rests on an estimate of the
        smallest eigenvalue).
        """
        return self.read("error_bound")

    @property
    def train_loss(self) -> NDArray[np.float32]:
        """[n_train], NaN where not recorded."""
        return self.read("train_loss")

    @property
    def train_gradient_norm(self) -> NDArray[np.float32]:
        """[n_train], NaN where not recorded."""
        return self.read("train_gradient_norm")

    @property
    def train_total(self) -> NDArray[np.float32]:
        """[n_train], the sum of a training point's influence over all test points; NaN where strips are missing.

        Its negative is the net harm: large where removing the point would lower the test loss. Written by the strips;
        results that do not have it are read a strip at a time. Raises ShapeError for mode `perturbation`.
        """
        require_ranked(self.layout, "train_total")
        if self.has("train_total"):
            return self.read("train_total")
        total = np.full(self.layout.n_train, np.nan, np.float32)
        for columns, values in analysis.strips(self):
            total[columns] = values.sum(axis=0, dtype=np.float64)
        return total

    @property
    def self_influence(self) -> NDArray[np.float32]:
        """[n_train], what `annotate` stored, else what the run computed; NaN where it is not known."""
        known = self.points("train").self_influence()
        return np.full(self.layout.n_train, np.nan, np.float32) if known is None else known

    @property
    def self_influence_error(self) -> NDArray[np.float32]:
        """[n_train], by how much a self-influence that the run computed may be wrong; NaN where nothing is known.

        `provenance["self_influence"]` says how it was computed. Rigorous or heuristic as `error_bound` is.
        """
        if self.has("self_influence_error"):
            return self.read("self_influence_error")
        return np.full(self.layout.n_train, np.nan, np.float32)

    def top(self, test_index: int, k: int | None = None, *, partial: bool = False) -> Ranking:
        """The k most helpful training points of a test point, largest influence first; ties by training index.

        `k`: all that are stored if None; more than n_train gives all. Beyond what is stored, the row is read.
        `partial`: rank over the strips that are there, if the result is incomplete. Raises IndexRangeError,
        IncompleteResultError, SettingError, and ShapeError for a result of mode `perturbation`.
        """
        return rank_row(self, "top", test_index, k, partial)

    def bottom(self, test_index: int, k: int | None = None, *, partial: bool = False) -> Ranking:
        """The k most harmful training points of a test point, smallest influence first. Otherwise as `top`."""
        return rank_row(self, "bottom", test_index, k, partial)

    def top_for_train(self, train_index: int, k: int | None = None) -> Ranking:
        """The k test points (10 if None) that a training point helps most. Reads one column.

        Raises IndexRangeError, SettingError, IncompleteResultError if its strip is missing, CorruptStoreError, and
        ShapeError for a result of mode `perturbation`.
        """
        return analysis.rank_column(self, "top", train_index, k)

    def bottom_for_train(self, train_index: int, k: int | None = None) -> Ranking:
        """The k test points that a training point harms most, smallest first. Otherwise as `top_for_train`."""
        return analysis.rank_column(self, "bottom", train_index, k)

    def top_of(
        self,
        tests: ArrayLike | slice,
        k: int | None = None,
        how: Literal["mean", "sum"] = "mean",
        *,
        partial: bool = False,
    ) -> Ranking:
        """The k training points that help a set of test points most, by the mean or sum of their influences.

        tests: a slice, indices, or a mask [n_test], such as `result.points("test").labels() == 3`. k: as `top`. Reads
        the rows of these test points, a strip at a time. Raises what `top` raises.
        """
        return analysis.rank_set(self, "top", tests, k, how, partial)

    def bottom_of(
        self,
        tests: ArrayLike | slice,
        k: int | None = None,
        how: Literal["mean", "sum"] = "mean",
        *,
        partial: bool = False,
    ) -> Ranking:
        """The k training points that harm a set of test points most, smallest influence first. As `top_of`."""
        return analysis.rank_set(self, "bottom", tests, k, how, partial)

    def group(
        self,
        test: ArrayLike | None = None,
        train: ArrayLike | None = None,
        how: Literal["mean", "sum"] = "mean",
        *,
        partial: bool = False,
    ) -> analysis.Grouped:
        """Influences of groups of training points on groups of test points. Reads the matrix once, a strip at a time.

        test: [n_test], train: [n_train], the group of each point (its label, say); None: every point for itself.
        partial: only over the strips that are there. Raises IncompleteResultError, ShapeError, SettingError.
        """
        return analysis.group(self, test, train, how, partial)

    def to_dataframe(
        self, tests: ArrayLike | None = None, k: int | None = None, *, partial: bool = False
    ) -> pandas.DataFrame:
        """The most helpful and harmful training points of `tests` (indices; all if None), one per line.

        Columns: test, rank, end, train, influence, bound (by how much the influence may be wrong, NaN where that is
        not known), and ids and names of labels where `annotate` stored them. k: all that are stored if None. Raises
        MissingDependencyError, and what `top` raises.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError(
                "`to_dataframe` needs pandas, which is not installed. Run pip install pandas."
            ) from error
        rows = None if tests is None else np.atleast_1d(np.asarray(tests, np.int64))
        return pandas.DataFrame(ranking_table(self, rows, k, partial))

    def contributions(self, test_index: int) -> Contributions | None:
        """What the influences of a test point's most helpful and harmful training points are made of.

        By block (layer), and by position of the training sample where the method knows it; for the first few of each
        ranking. None if the run kept none: ask it with `contributions=True`. Raises IndexRangeError, ShapeError for a
        result of mode `perturbation`, IncompleteResultError, CorruptStoreError.
        """
        require_ranked(self.layout, "contributions")
        return read_contributions(self, checked_index("test_index", test_index, self.layout.n_test))

    def to_xarray(self, *, chunks: Chunks = None) -> xarray.Dataset:
        """The result as a lazy xarray Dataset with dimensions test and train.

        Coordinates: test and train indices, `test_id`, `train_id`, labels and self-influences where they are known, and
        `damping`: a number, or one for each `block`. chunks: None for lazy arrays that read what is indexed; {} for
        dask arrays in the chunks of the disk, a mapping for others. Raises MissingDependencyError, CorruptStoreError.
        """
        return as_dataset(self, chunks)

    def to_datatree(self, *, chunks: Chunks = None) -> xarray.DataTree:
        """All that is known, as an xarray DataTree: `to_xarray` at its root, below it what else is stored.

        `/test_samples` and `/train_samples` are what `annotate` stored, `/contributions` what rankings are made of,
        with the coordinate `block` (layers). chunks: as `to_xarray`. Raises MissingDependencyError, CorruptStoreError.
        """
        return as_datatree(self, chunks)


def _method(provenance: Mapping[str, Any]) -> str:
    solver = provenance.get("solver")
    if isinstance(solver, Mapping):
        solver = solver.get("name", solver.get("method"))
    return solver if isinstance(solver, str) else "method not recorded"
