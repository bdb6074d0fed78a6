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
from distinfluence.store.read.facts import how_solved, result_as_html
from distinfluence.store.read.row_ranking import rank_row
from distinfluence.store.read.tables import ranking_table
from distinfluence.store.read.xarray_view import Chunks, as_dataset, as_datatree

if TYPE_CHECKING:
    import pandas
    import xarray


def open_influences(path: str | os.PathLike[str]) -> InfluenceResult:
    """Open a result for reading. Nothing of the matrix is read yet.

    Args:
        path: A folder, or a URL that fsspec knows (s3://…, https://…).

    Returns:
        The result.

    Raises:
        StoreNotFoundError: If there is nothing at `path`.
        ForeignStoreError: If something else than a result is at `path`.
        StoreError: If a newer version wrote the result, or the server does not answer.
        CorruptStoreError: If the attributes of the result are damaged.
        MissingDependencyError: If the file system of the URL needs another package.
    """
    return InfluenceResult(place_of(path))


class InfluenceResult(ResultArrays):
    """A result on disk: the influences of training points (columns) on test points (rows).

    A positive influence means that the training point helps. All but the attributes below is read when asked for.
    Indices count as in NumPy, so -1 is the last point. Open a result with `open_influences`.

    Attributes:
        path: The folder, or the URL.
        layout: The cut of the result into strips.
        provenance: What the run recorded, as of opening.
    """

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (open_influences, (str(self.path),))

    def __repr__(self) -> str:
        n_test, n_train = self.shape[:2]
        done = self.layout.n_strips - self.n_missing
        state = "complete" if self.complete else f"running, {done} of {self.layout.n_strips} strips"
        return (
            f"<InfluenceResult {n_test} test x {n_train} train{' x input ' if self.layout.input_shape else ''}"
            f"{self.layout.input_shape or ''}, {_method(self.provenance)}, {state}, "
            f"{how_solved(self.converged, self.relative_residual)}, {str(self.path)!r}>"
        )

    def _repr_html_(self) -> str:
        """Return the facts of the result as a table, for notebooks."""
        return result_as_html(self)

    @property
    def influences(self) -> zarr.Array[Any]:
        """The matrix as a zarr array, [n_test, n_train, *input_shape] float32; NaN where strips are missing."""
        return self._array("influences")

    @property
    def progress(self) -> float:
        """Fraction of the strips that are written, from 0 to 1."""
        return 1.0 - self.n_missing / self.layout.n_strips

    @property
    def quarantined(self) -> dict[int, str]:
        """Strips that the run could not make, with the reason for each; as of opening."""
        noted = self.provenance.get("quarantined")
        if not isinstance(noted, Mapping):
            return {}
        return {int(i): str(reason) for i, reason in noted.items() if str(i).isdecimal()}

    @property
    def bytes_read(self) -> int:
        """Bytes that were read through this object, metadata included."""
        return self._store.bytes_read

    @property
    def test_loss(self) -> NDArray[np.float32]:
        """Losses of the test points, [n_test]; NaN where not recorded."""
        return self.read("test_loss")

    @property
    def test_gradient_norm(self) -> NDArray[np.float32]:
        """Norms of the test gradients, [n_test]; NaN where not recorded."""
        return self.read("test_gradient_norm")

    @property
    def relative_residual(self) -> NDArray[np.float32]:
        """Residuals relative to the norm of the right-hand side, [n_test]; NaN where not recorded."""
        return self.read("relative_residual")

    @property
    def iterations(self) -> NDArray[np.int32]:
        """Iterations of the solver, [n_test]; -1 where not recorded."""
        return self.read("iterations")

    @property
    def converged(self) -> NDArray[np.bool_]:
        """Whether each row converged, [n_test]; False where not recorded."""
        return self.read("converged")

    @property
    def error_bound(self) -> NDArray[np.float32]:
        """Factors c_i with |stored − exact| ≤ c_i · `train_gradient_norm`_j, [n_test]; NaN where there is none.

        `provenance["error_bound"]` says whether the bound is "rigorous" or "heuristic". A heuristic bound rests on an
        estimate of the smallest eigenvalue.
        """
        return self.read("error_bound")

    @property
    def train_loss(self) -> NDArray[np.float32]:
        """Losses of the training points, [n_train]; NaN where not recorded."""
        return self.read("train_loss")

    @property
    def train_gradient_norm(self) -> NDArray[np.float32]:
        """Norms of the training gradients, [n_train]; NaN where not recorded."""
        return self.read("train_gradient_norm")

    @property
    def train_total(self) -> NDArray[np.float32]:
        """Sums of each training point's influences over all test points, [n_train]; NaN where strips are missing.

        The negative sum is the net harm: it is large where removing the point would lower the test loss. The strips
        write these sums; a result that does not have them is read a strip at a time.

        Raises:
            ShapeError: If the result is of mode `perturbation`.
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
        """Self-influences that `annotate` stored, else those that the run computed, [n_train]; NaN where unknown."""
        known = self.points("train").self_influence()
        return np.full(self.layout.n_train, np.nan, np.float32) if known is None else known

    @property
    def self_influence_error(self) -> NDArray[np.float32]:
        """Error bounds of the self-influences that the run computed, [n_train]; NaN where there is none.

        `provenance["self_influence"]` says how they were computed. The bounds are rigorous where `error_bound` is.
        """
        if self.has("self_influence_error"):
            return self.read("self_influence_error")
        return np.full(self.layout.n_train, np.nan, np.float32)

    def top(self, test_index: int, k: int | None = None, *, partial: bool = False) -> Ranking:
        """Rank the training points that help a test point most, largest influence first; ties by training index.

        Args:
            test_index: The test point.
            k: How many training points. Default: as many as are stored. Beyond those, the whole row is read.
            partial: Whether to rank over the strips that are written, if the result is incomplete.

        Returns:
            At most k training points and their influences.

        Raises:
            IndexRangeError: If there is no such test point.
            SettingError: If `k` is below 1.
            IncompleteResultError: If strips are missing and not `partial`.
            CorruptStoreError: If stored values are missing or damaged.
            ShapeError: If the result is of mode `perturbation`.
        """
        return rank_row(self, "top", test_index, k, partial)

    def bottom(self, test_index: int, k: int | None = None, *, partial: bool = False) -> Ranking:
        """Rank the training points that harm a test point most, smallest influence first; ties by training index.

        Args:
            test_index: The test point.
            k: How many training points. Default: as many as are stored. Beyond those, the whole row is read.
            partial: Whether to rank over the strips that are written, if the result is incomplete.

        Returns:
            At most k training points and their influences.

        Raises:
            IndexRangeError: If there is no such test point.
            SettingError: If `k` is below 1.
            IncompleteResultError: If strips are missing and not `partial`.
            CorruptStoreError: If stored values are missing or damaged.
            ShapeError: If the result is of mode `perturbation`.
        """
        return rank_row(self, "bottom", test_index, k, partial)

    def top_for_train(self, train_index: int, k: int | None = None) -> Ranking:
        """Rank the test points that a training point helps most, largest influence first. Reads one column.

        Args:
            train_index: The training point.
            k: How many test points. Default: 10.

        Returns:
            At most k test points and the influences on them.

        Raises:
            IndexRangeError: If there is no such training point.
            SettingError: If `k` is below 1.
            IncompleteResultError: If the strip of the training point is missing.
            CorruptStoreError: If stored values are missing or damaged.
            ShapeError: If the result is of mode `perturbation`.
        """
        return analysis.rank_column(self, "top", train_index, k)

    def bottom_for_train(self, train_index: int, k: int | None = None) -> Ranking:
        """Rank the test points that a training point harms most, smallest influence first. Reads one column.

        Args:
            train_index: The training point.
            k: How many test points. Default: 10.

        Returns:
            At most k test points and the influences on them.

        Raises:
            IndexRangeError: If there is no such training point.
            SettingError: If `k` is below 1.
            IncompleteResultError: If the strip of the training point is missing.
            CorruptStoreError: If stored values are missing or damaged.
            ShapeError: If the result is of mode `perturbation`.
        """
        return analysis.rank_column(self, "bottom", train_index, k)

    def top_of(
        self,
        tests: ArrayLike | slice,
        k: int | None = None,
        how: Literal["mean", "sum"] = "mean",
        *,
        partial: bool = False,
    ) -> Ranking:
        """Rank the training points that help a set of test points most. Reads their rows, a strip at a time.

        Args:
            tests: A slice, indices, or a mask [n_test], such as `result.points("test").labels() == 3`.
            k: How many training points. Default: as many as are stored for one test point.
            how: Whether to rank by the mean or by the sum of the influences on these test points.
            partial: Whether to rank over the strips that are written, if the result is incomplete.

        Returns:
            At most k training points and their mean or summed influences.

        Raises:
            IndexRangeError: If there is no such test point.
            SettingError: If `k` is below 1, `how` is unknown, or `tests` are not indices.
            IncompleteResultError: If strips are missing and not `partial`.
            CorruptStoreError: If stored values are missing or damaged.
            ShapeError: If the result is of mode `perturbation`.
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
        """Rank the training points that harm a set of test points most. Reads their rows, a strip at a time.

        Args:
            tests: A slice, indices, or a mask [n_test], such as `result.points("test").labels() == 3`.
            k: How many training points. Default: as many as are stored for one test point.
            how: Whether to rank by the mean or by the sum of the influences on these test points.
            partial: Whether to rank over the strips that are written, if the result is incomplete.

        Returns:
            At most k training points and their mean or summed influences, smallest first.

        Raises:
            IndexRangeError: If there is no such test point.
            SettingError: If `k` is below 1, `how` is unknown, or `tests` are not indices.
            IncompleteResultError: If strips are missing and not `partial`.
            CorruptStoreError: If stored values are missing or damaged.
            ShapeError: If the result is of mode `perturbation`.
        """
        return analysis.rank_set(self, "bottom", tests, k, how, partial)

    def group(
        self,
        test: ArrayLike | None = None,
        train: ArrayLike | None = None,
        how: Literal["mean", "sum"] = "mean",
        *,
        partial: bool = False,
    ) -> analysis.Grouped:
        """Aggregate the influences of groups of training points on groups of test points.

        The matrix is read once, a strip at a time.

        Args:
            test: The group of each test point, [n_test], such as its label. Default: each point is a group.
            train: The group of each training point, [n_train]. Default: each point is a group.
            how: Whether to take the mean or the sum over the pairs of each two groups.
            partial: Whether to aggregate over the strips that are written, if the result is incomplete.

        Returns:
            The groups of both axes, sorted, and the values [n_test_groups, n_train_groups].

        Raises:
            IncompleteResultError: If strips are missing and not `partial`.
            SettingError: If `how` is neither "mean" nor "sum".
            ShapeError: If the groups are not one per point, or the result is of mode `perturbation`.
        """
        return analysis.group(self, test, train, how, partial)

    def to_dataframe(
        self, tests: ArrayLike | None = None, k: int | None = None, *, partial: bool = False
    ) -> pandas.DataFrame:
        """Return the most helpful and most harmful training points as a pandas DataFrame, one pair of points per line.

        Columns: test, rank, end, train, influence, bound (an error bound of the influence, NaN where there is none),
        and ids and names of labels where `annotate` stored them.

        Args:
            tests: Indices of test points. Default: all.
            k: How many training points at each end. Default: as many as are stored.
            partial: Whether to rank over the strips that are written, if the result is incomplete.

        Returns:
            The table.

        Raises:
            MissingDependencyError: If pandas is not installed.
            IndexRangeError: If there is no such test point.
            SettingError: If `k` is below 1.
            IncompleteResultError: If strips are missing and not `partial`.
            CorruptStoreError: If stored values are missing or damaged.
            ShapeError: If the result is of mode `perturbation`.
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
        """Split the influences of a test point's most helpful and most harmful training points into contributions.

        Contributions are by block (layer), and by position of the training sample where the method knows it.

        Args:
            test_index: The test point.

        Returns:
            The contributions for the first pairs of both rankings; None if the run stored none (`contributions=True`).

        Raises:
            IndexRangeError: If there is no such test point.
            IncompleteResultError: If the result is not finished.
            CorruptStoreError: If stored values are missing or damaged.
            ShapeError: If the result is of mode `perturbation`.
        """
        require_ranked(self.layout, "contributions")
        return read_contributions(self, checked_index("test_index", test_index, self.layout.n_test))

    def to_xarray(self, *, chunks: Chunks = None) -> xarray.Dataset:
        """Return the result as a lazy xarray Dataset with dimensions test and train.

        Coordinates: indices of both axes, `test_id`, `train_id`, labels and self-influences where they are known, and
        `damping`: a number, or one for each `block`.

        Args:
            chunks: None for lazy arrays that read what is indexed, {} for dask arrays in the chunks of the disk, a
                mapping or "auto" for other chunks.

        Returns:
            The dataset.

        Raises:
            MissingDependencyError: If xarray is not installed.
            CorruptStoreError: If an array is not what the layout says.
        """
        return as_dataset(self, chunks)

    def to_datatree(self, *, chunks: Chunks = None) -> xarray.DataTree:
        """Return everything that is stored as a lazy xarray DataTree, with `to_xarray` at its root.

        `/test_samples` and `/train_samples` hold what `annotate` stored. `/contributions` holds the contributions,
        with the coordinate `block` (layers).

        Args:
            chunks: As for `to_xarray`.

        Returns:
            The tree.

        Raises:
            MissingDependencyError: If xarray is not installed.
            CorruptStoreError: If an array is not what the layout says.
        """
        return as_datatree(self, chunks)


def _method(provenance: Mapping[str, Any]) -> str:
    solver = provenance.get("solver")
    if isinstance(solver, Mapping):
        solver = solver.get("name", solver.get("method"))
    return solver if isinstance(solver, str) else "method not recorded"
