"""Reading a result: lazy, read-only, also while the run is still writing. Nothing is loaded until it is asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from distinfluence.errors import (
    CorruptStoreError,
    DistinfluenceError,
    MissingDependencyError,
)
from distinfluence.store.format.contribution_layout import spec_of
from distinfluence.store.format.folder import COMPLETE, RUNNING, place_of, read_attributes, surfaced_errors
from distinfluence.store.format.layout import Layout, array_specs
from distinfluence.store.format.ranking import Ranking, checked_index, require_ranked
from distinfluence.store.format.remote import RemoteFolder, RemoteStore
from distinfluence.store.read import analysis
from distinfluence.store.read.annotations import Axis, StoredPoints, names_of, read_samples
from distinfluence.store.read.contributions import Contributions, read_contributions
from distinfluence.store.read.facts import result_as_html
from distinfluence.store.read.guarded_store import GuardedStore, checked, is_bounded, largest_file, open_to_read
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


class InfluenceResult:
    """The influences of training points on test points, on disk. Rows are test points, columns training points.

    Positive: the training point helps. `provenance` and `complete` are as of opening; all else is read when asked for.
    Indices count as in NumPy, so -1 is the last point.
    """

    def __init__(self, path: Path | RemoteFolder) -> None:
        attributes = read_attributes(path)
        self.path = path
        self.layout = _layout_of(attributes, path)
        self.provenance: Mapping[str, Any] = MappingProxyType(attributes)
        self._specs = {spec.name: spec for spec in array_specs(self.layout)}
        with surfaced_errors("open", path):
            self._group, self._store = open_to_read(path)
        if isinstance(self._store, GuardedStore):
            self._store.largest = largest_file(self._specs.values())

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

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """A tile, as `result[i]`, `result[i, a:b]`; read from disk, NaN where strips are missing."""
        return self.read("influences", key)

    def rows(self, rows: NDArray[np.int64], columns: slice) -> NDArray[np.float32]:
        """Some rows of some columns, [n, m, *input_shape]; rows: sorted, from 0. Reads the chunks that hold them."""
        if rows[-1] - rows[0] + 1 == rows.size:
            return self[int(rows[0]) : int(rows[-1]) + 1, columns]
        array = self.influences
        with surfaced_errors("read", self.path):
            return np.asarray(array.oindex[rows, columns])

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
        return self.layout.n_strips - int(self.finished_strips().sum())

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
        require_ranked(self, "train_total")
        if self._has("train_total"):
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
        if self._has("self_influence_error"):
            return self.read("self_influence_error")
        return np.full(self.layout.n_train, np.nan, np.float32)

    def points(self, axis: Axis) -> StoredPoints:
        """Labels and samples of the test or the training points, as `annotate` stored them."""
        with surfaced_errors("read", self.path):
            return read_samples(self._group, axis, self.layout.n_test if axis == "test" else self.layout.n_train)

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

    @property
    def contribution_blocks(self) -> list[str]:
        """Names of the blocks (layers) that `contributions` tells apart; none if the run kept none."""
        if not self.layout.ranked or not self._has("contributions"):
            return []
        return names_of(self._own_group("contributions").attrs.get("blocks"))

    @property
    def n_contributions(self) -> int:
        """How many pairs at each end of a ranking `contributions` tells apart; 0 if the run kept none."""
        return int(self.contribution_array("top").shape[1]) if self.contribution_blocks else 0

    @property
    def has_token_contributions(self) -> bool:
        """Whether `contributions` tells the positions of the training samples apart as well."""
        return self._has("contributions/top_tokens")

    def contributions(self, test_index: int) -> Contributions | None:
        """What the influences of a test point's most helpful and harmful training points are made of.

        By block (layer), and by position of the training sample where the method knows it; for the first few of each
        ranking. None if the run kept none: ask it with `contributions=True`. Raises IndexRangeError, ShapeError for a
        result of mode `perturbation`, IncompleteResultError, CorruptStoreError.
        """
        require_ranked(self, "contributions")
        return read_contributions(self, checked_index("test_index", test_index, self.layout.n_test))

    def contribution_array(self, name: str) -> zarr.Array[Any]:
        """`top`, `bottom`, `top_tokens` or `bottom_tokens` of the group `contributions`, checked."""
        name = f"contributions/{name}"
        spec = spec_of(name, self._own_array(name), len(self.contribution_blocks), self.layout, self.path)
        return checked(self._own_array(name), spec, self.path)

    def overview(self, name: str, columns: slice) -> NDArray[np.float32]:
        """Cells of the overview `name` (see `layout.levels`), all rows of them, `columns` counted in cells."""
        return self.read(f"overview/{name}", (slice(None), columns))

    def lost_strips(self) -> list[int]:
        """The marked strips whose file is gone. Looks at the folder only; `damaged_strips` reads everything."""
        tail = "/0" * len(self.layout.input_shape)
        marked = np.flatnonzero(self.finished_strips()).tolist()
        return [i for i in marked if not self._is_file(f"influences/c/0/{i}{tail}")]

    def expanding_arrays(self) -> list[str]:
        """Arrays with codecs that may expand to anything; the writer makes none. Damaged ones do not count."""
        found = []
        for name in self._specs:
            with contextlib.suppress(CorruptStoreError):  # which reading it raises
                if self._has(name) and not is_bounded(self._array(name)):
                    found.append(name)
        return found

    def damaged_strips(self) -> list[int]:
        """The marked strips whose bytes are not those that were written. Reads the whole result, a strip at a time."""
        damaged = []
        for i in np.flatnonzero(self.finished_strips()):
            try:
                if not np.isfinite(self.read("influences", (slice(None), self.layout.strip_slice(int(i))))).all():
                    damaged.append(int(i))
            except CorruptStoreError:
                damaged.append(int(i))
        return damaged

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

    @property
    def store(self) -> GuardedStore | RemoteStore:
        """What zarr reads the result from, read-only."""
        return self._store

    def check_arrays(self) -> None:
        """Raise CorruptStoreError if an array at the root is not what the layout says."""
        for name in self._specs:
            if "/" not in name and self._has(name):
                self._array(name)

    def _is_file(self, key: str) -> bool:
        path = self.path
        return path.has(key) if isinstance(path, RemoteFolder) else (path / key).is_file()

    def _has(self, name: str) -> bool:
        return self._is_file(f"{name}/zarr.json")  # zarr's own look raises for metadata that are torn

    def _array(self, name: str) -> zarr.Array[Any]:
        return checked(self._node(name), self._specs[name], self.path)

    def _node(self, name: str) -> zarr.Array[Any] | zarr.Group:
        with surfaced_errors("read", self.path):
            try:
                return self._group[name]
            except KeyError:
                expected = f", expected {list(self._specs[name].shape)}" if name in self._specs else ""
                raise CorruptStoreError(f"`{name}` of {self.path} is missing{expected}. Compute it again.") from None
            except (TypeError, ValueError) as error:
                raise CorruptStoreError(
                    f"`{name}` of {self.path} cannot be read: {error}. Compute it again."
                ) from error

    def _own_group(self, name: str) -> zarr.Group:
        node = self._node(name)
        if not isinstance(node, zarr.Group):
            raise CorruptStoreError(f"`{name}` of {self.path} must be a group, got an array. Compute it again.")
        return node

    def _own_array(self, name: str) -> zarr.Array[Any]:
        node = self._node(name)
        if not isinstance(node, zarr.Array):
            raise CorruptStoreError(f"`{name}` of {self.path} must be an array, got a group. Compute it again.")
        return node

    def read(self, name: str, key: Any = slice(None)) -> NDArray[Any]:
        """An array of the layout, or a part of it, checked."""
        array = self._array(name)
        with surfaced_errors("read", self.path):
            return np.asarray(array[key])

    def finished_strips(self) -> NDArray[np.bool_]:
        """[n_strips], which are whole."""
        finished: NDArray[np.bool_] = self.read("strip_status") == 1
        return finished


def _layout_of(attributes: Mapping[str, Any], path: Path | RemoteFolder) -> Layout:
    try:
        layout = Layout.from_attributes(attributes["layout"])
    except (LookupError, TypeError, DistinfluenceError) as error:
        raise CorruptStoreError(
            f"`layout` in the attributes of {path} is none: {error!r}. Compute the result again."
        ) from error
    if attributes.get("state") not in (RUNNING, COMPLETE):
        raise CorruptStoreError(
            f"`state` in the attributes of {path} must be {RUNNING} or {COMPLETE}, got {attributes.get('state')!r}."
        )
    return layout


def _method(provenance: Mapping[str, Any]) -> str:
    solver = provenance.get("solver")
    if isinstance(solver, Mapping):
        solver = solver.get("name", solver.get("method"))
    return solver if isinstance(solver, str) else "method not recorded"
