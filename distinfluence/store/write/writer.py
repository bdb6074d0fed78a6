"""Writing a result: many processes, one writer per strip, safe to kill at any moment.

A strip's shard, its points' arrays and its partial ranking are written and synced first, its mark last; so a marked
strip is whole, and a run that died goes on with the strips in `pending`. Costs: one file per strip in each of
`influences`, `strip_status`, the two partial rankings and what was given per training point; one fsync for each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from distinfluence.errors import CorruptStoreError, IncompleteResultError
from distinfluence.store.format.fingerprint import to_json
from distinfluence.store.format.folder import (
    COMPLETE,
    RUNNING,
    Location,
    consolidate,
    place_of,
    put_in_place,
    read_attributes,
    surfaced_errors,
)
from distinfluence.store.format.layout import Layout, array_specs
from distinfluence.store.format.overview import strip_cells
from distinfluence.store.format.ranking import (
    Ranking,
    empty_ranking,
    merge_harmful,
    merge_helpful,
    most_harmful,
    most_helpful,
)
from distinfluence.store.format.remote import RemoteFolder
from distinfluence.store.write.resume import check_resumable
from distinfluence.store.write.schema import build, create_array, stored_attributes
from distinfluence.store.write.values import check_rows, per_point, require_finite, rounded, rounded_up, strip_values

QUARANTINED = 2  # in `strip_status`: tried and failed; 1 is whole, 0 not made yet

TEST_ARRAYS = ("test_loss", "test_gradient_norm", "relative_residual", "iterations", "converged", "error_bound")
RANKING_ARRAYS = tuple(f"{end}_{what}" for end in ("top", "bottom") for what in ("index", "value"))
_DRIVER_CHUNKS = [
    *((name, "0/0") for name in RANKING_ARRAYS),
    *((name, "0") for name in TEST_ARRAYS),
]
BY_STRIP = ("train_loss", "train_gradient_norm", "train_total", "self_influence", "self_influence_error")


class InfluenceWriter:
    """A result on disk, open for writing. Make one with `create`, `open` or `resume`; it can be pickled (as its path).

    Any number of processes may call `write_strip` at once, for different strips. `create`, `write_test`, `reopen` and
    `finish` are for the one process that drives the run.
    """

    def __init__(self, path: Location, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        with surfaced_errors("open", path):
            self._group = zarr.open_group(path.writable_store(), mode="r+", use_consolidated=False)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        layout: Layout,
        attributes: Mapping[str, object],
        *,
        overwrite: bool = False,
    ) -> InfluenceWriter:
        """Make an empty result at `path` and open it.

        `attributes` are JSON values; `resume` compares `fingerprints` (name -> hex) and whichever others it is given.
        Raises ForeignStoreError if something else lies there (nothing is touched), StoreExistsError if a result does
        and not `overwrite`, SettingError if `attributes` are no JSON or use a reserved name.
        """
        folder = place_of(path)
        stored = stored_attributes(layout, attributes)
        with put_in_place(folder, overwrite) as new:
            build(new, layout, stored)
        return cls(folder, layout)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> InfluenceWriter:
        """Open an existing result for writing. Raises StoreNotFoundError, ForeignStoreError, StoreError."""
        folder = place_of(path)
        return cls(folder, Layout.from_attributes(read_attributes(folder)["layout"]))

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        layout: Layout,
        fingerprints: Mapping[str, str],
        settings: Mapping[str, object] | None = None,
    ) -> InfluenceWriter:
        """`open`, after `check_resumable`."""
        check_resumable(path, layout, fingerprints, settings)
        return cls.open(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (InfluenceWriter.open, (str(self.path),))

    def __repr__(self) -> str:
        return f"InfluenceWriter({str(self.path)!r}, shape={self.layout.shape}, strips={self.layout.n_strips})"

    def write_test(
        self,
        rows: slice,
        *,
        loss: NDArray[Any] | None = None,
        gradient_norm: NDArray[Any] | None = None,
        relative_residual: NDArray[Any] | None = None,
        iterations: NDArray[Any] | None = None,
        converged: NDArray[Any] | None = None,
        error_bound: NDArray[Any] | None = None,
    ) -> None:
        """Write what is known of the test points `rows`; each array is [rows]. One process at a time.

        `loss` and `gradient_norm` must be finite; `relative_residual` (to the norm of the right-hand side) need not be.
        An array whose file was torn loses its other rows: write all of them again.
        `error_bound`: c_i with |stored − exact| ≤ c_i·‖g_j‖ for every training point j; rounded up to float32.
        Raises IndexRangeError, ShapeError, DtypeError, NonFiniteError, StoreError.
        """
        n_rows = check_rows(rows, self.layout.n_test)
        given = {
            "test_loss": per_point("loss", loss, n_rows, "fiu", np.float32),
            "test_gradient_norm": per_point("gradient_norm", gradient_norm, n_rows, "fiu", np.float32),
            "relative_residual": per_point("relative_residual", relative_residual, n_rows, "fiu", np.float32),
            "iterations": per_point("iterations", iterations, n_rows, "iu", np.int32),
            "converged": per_point("converged", converged, n_rows, "b", np.bool_),
            "error_bound": rounded_up(per_point("error_bound", error_bound, n_rows, "f", np.float64)),
        }
        for name in ("test_loss", "test_gradient_norm"):
            require_finite(f"{name} of test points {rows.start or 0}…", given[name])
        for name, values in given.items():
            if values is None:
                continue
            try:
                with surfaced_errors("write to", self.path):
                    self._array(name)[rows] = values
            except CorruptStoreError:  # torn by a power failure: zarr reads what lies there before it replaces a part
                with surfaced_errors("write to", self.path):
                    self.path.delete([f"{name}/c/0"])
                    self._array(name)[rows] = values

    def knows_tests(self) -> bool:
        """Whether what `write_test` was given is there for every test point, as it was written."""
        try:
            with surfaced_errors("read", self.path):
                for name in TEST_ARRAYS:
                    known = np.asarray(self._array(name)[:])
                    if name == "iterations" and (known < 0).any():
                        return False
        except CorruptStoreError:
            return False
        return True

    def write_strip(
        self,
        i: int,
        values: NDArray[Any],
        *,
        loss: NDArray[Any] | None = None,
        gradient_norm: NDArray[Any] | None = None,
    ) -> bool:
        """Write strip i and mark it. values: [n_test, n_i, *input_shape]; loss, gradient_norm: [n_i].

        A strip that is marked already is left as it is (the first writer wins, so that backup tasks are harmless):
        returns whether this call wrote. Values are stored as float32. Raises IndexRangeError, ShapeError, DtypeError,
        NonFiniteError, or StoreError (disk full, no permission); the strip then stays unmarked.
        """
        values = rounded(strip_values(i, values, self.layout.strip_shape(i)), self.layout.mantissa_bits)
        loss = per_point("loss", loss, values.shape[1], "fiu", np.float32)
        gradient_norm = per_point("gradient_norm", gradient_norm, values.shape[1], "fiu", np.float32)
        require_finite(f"loss of strip {i}", loss)
        require_finite(f"gradient_norm of strip {i}", gradient_norm)
        action = f"write strip {i} to"
        with surfaced_errors(action, self.path):
            if self.is_done(i):
                return False
            try:
                with surfaced_errors(action, self.path):
                    self._write_chunks(i, values, loss, gradient_norm)
            except CorruptStoreError:
                # zarr reads what lies there before it replaces a shard at the edge: here a torn file, from a power cut.
                self._delete_chunks(i)
                self._write_chunks(i, values, loss, gradient_norm)
            self.path.settle(self._keys_of(i))
            self._mark(i, 1)
        return True

    def write_self_influence(self, i: int, values: NDArray[Any], error: NDArray[Any]) -> None:
        """Write the self-influences of strip i's training points, [n_i], and by how much they may be wrong, [n_i].

        error: NaN where nothing is known. Raises IndexRangeError, ShapeError, DtypeError, NonFiniteError, StoreError.
        """
        columns = self.layout.strip_slice(i)
        n = columns.stop - columns.start
        values = np.asarray(per_point("values", values, n, "f", np.float32))
        require_finite(f"self-influences of strip {i}", values)
        error = np.asarray(rounded_up(per_point("error", error, n, "f", np.float64)))
        with surfaced_errors(f"write self-influences of strip {i} to", self.path):
            self._array("self_influence_error")[columns] = error
            self._array("self_influence")[columns] = values  # last: it says that both are there
            self.path.settle([f"{name}/c/{i}" for name in ("self_influence_error", "self_influence")])

    def without_self_influence(self) -> list[int]:
        """The strips whose training points have no self-influences yet."""
        return [i for i in range(self.layout.n_strips) if not self.path.has(f"self_influence/c/{i}")]

    def rankings(self, k: int) -> tuple[Ranking, Ranking]:
        """The first k of the stored rankings, helpful and harmful, [n_test, k] each. The result must be finished."""
        with surfaced_errors("read", self.path):
            top, bottom = (
                Ranking(np.asarray(self._array(f"{end}_index")[:, :k]), np.asarray(self._array(f"{end}_value")[:, :k]))
                for end in ("top", "bottom")
            )
        for ranking in (top, bottom):
            if (ranking.indices < 0).any() or (ranking.indices >= self.layout.n_train).any():
                raise CorruptStoreError(f"the rankings of {self.path} are missing or damaged. Call `finish` again.")
        return top, bottom

    def note(self, seconds: Mapping[str, float], **attributes: object) -> None:
        """Add what was done after `finish` to the summary: seconds by stage, and attributes of its own."""
        with surfaced_errors("write to", self.path):
            summary = dict(read_attributes(self.path).get("summary") or {})
            before = summary.get("seconds") or {}
            summary["seconds"] = {**{name: round(value, 3) for name, value in seconds.items()}, **before}
            for name, value in {"summary": summary, **attributes}.items():
                self._group.attrs[name] = to_json(value, name)
            consolidate(self.path)

    def pending(self) -> list[int]:
        """The strips that are still to be written: not marked, or marked but with their shard gone from the disk."""
        with surfaced_errors("read", self.path):
            status = np.asarray(self._array("strip_status")[:])
            # what lies behind a URL does not vanish in a power failure, and is slow to be asked for one by one
            there = isinstance(self.path, RemoteFolder)
            return [i for i in range(self.layout.n_strips) if status[i] != 1 or not (there or self._has_shard(i))]

    def reopen(self, strips: Iterable[int], arrays: Iterable[str] = ()) -> None:
        """Unmark and delete strips (damaged ones, say), so that they are pending and the result is running again.

        arrays: of test points, or rankings, to delete: what `write_test` was given is to be written again, rankings are
        folded again by `finish`. `distinfluence.store.repair` finds both.
        """
        strips, arrays = list(strips), list(arrays)
        if not set(TEST_ARRAYS).isdisjoint(arrays):  # they are written together, and lacking together
            arrays += TEST_ARRAYS
        for i in strips:
            self.layout.strip_slice(i)
        if not strips and not arrays:
            return
        with surfaced_errors("write to", self.path):
            self._group.attrs["state"] = RUNNING
            if "contributions" in self._group:  # of rankings that may change
                del self._group["contributions"]
            self.path.delete([f"{name}/c" for name in arrays])
            for i in strips:
                self._mark(i, 0)
                self._delete_chunks(i)

    def quarantine(self, reasons: Mapping[int, str]) -> None:
        """Note strips that cannot be made, with the reason for each: they stay pending, readers can say why."""
        with surfaced_errors("write to", self.path):
            for i in reasons:
                self._mark(i, QUARANTINED)
            self._group.attrs["quarantined"] = {str(i): reason for i, reason in reasons.items()}

    def finish(self, summary: Mapping[str, object] | None = None) -> None:
        """Fold the strips' rankings into `top_…` and `bottom_…`, consolidate the metadata, mark the result complete.

        summary: JSON values that are only known at the end (seconds per stage, say), kept as the attribute `summary`.
        Can be called again, also after a kill. Raises IncompleteResultError if strips are pending.
        """
        pending = self.pending()
        if pending:
            raise IncompleteResultError(
                f"{len(pending)} of {self.layout.n_strips} strips are not written yet ({_some(pending)}), expected "
                f"none pending in {self.path}. Write them, then call `finish` again."
            )
        with surfaced_errors("finish", self.path):
            if read_attributes(self.path)["state"] != COMPLETE:
                if self.layout.ranked:
                    self._fold_rankings()
                self.path.sweep()
                self.path.settle([f"{name}/c/{chunk}" for name, chunk in _DRIVER_CHUNKS])
                if summary is not None:
                    self._group.attrs["summary"] = to_json(summary, "summary")
                self._group.attrs["quarantined"] = {}
                self._group.attrs["state"] = COMPLETE
            consolidate(self.path)

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            spec = next(spec for spec in array_specs(self.layout) if spec.name == name)
            # a result that an older version began may not have it
            array = self._group[name] if name in self._group else create_array(self._group, spec, self.layout)
            if not isinstance(array, zarr.Array):
                raise CorruptStoreError(
                    f"`{name}` of {self.path} must be an array, got a group. Compute the result again."
                )
            self._arrays[name] = array
        return self._arrays[name]

    def _write_chunks(
        self, i: int, values: NDArray[np.float32], loss: NDArray[Any] | None, gradient_norm: NDArray[Any] | None
    ) -> None:
        columns = self.layout.strip_slice(i)
        # One assignment per shard: two would read the shard back and write it twice.
        self._array("influences")[:, columns] = values
        for name, given in (("train_loss", loss), ("train_gradient_norm", gradient_norm)):
            if given is not None:
                self._array(name)[columns] = given
        if self.layout.ranked:
            self._write_partial_ranking(i, values)
            self._write_overview(i, values)

    def _delete_chunks(self, i: int) -> None:
        self.path.delete(self._keys_of(i))

    def _mark(self, i: int, status: int) -> None:
        self._array("strip_status")[i] = status
        self.path.settle([f"strip_status/c/{i}"])

    def is_done(self, i: int) -> bool:
        """Whether strip i is marked and its shard is there."""
        return bool(np.asarray(self._array("strip_status")[i]) == 1) and self._has_shard(i)

    def _has_shard(self, i: int) -> bool:
        return self.path.has(self._keys_of(i)[0])

    def _keys_of(self, i: int) -> list[str]:
        """The files of a strip, its shard first."""
        shard = "/".join(["influences/c/0", str(i), *("0" for _ in self.layout.input_shape)])
        per_point = [f"{name}/c/{i}" for name in BY_STRIP]
        overviews = [f"overview/{level.name}/c/0/{i}" for level in self.layout.levels]
        return [shard, *per_point, *(f"strips/{name}/c/{i}/0/0/0" for name in ("index", "value")), *overviews]

    def _write_partial_ranking(self, i: int, values: NDArray[np.float32]) -> None:
        columns = self.layout.strip_slice(i)
        points = np.arange(columns.start, columns.stop, dtype=np.int32)
        helpful = most_helpful(values, points, self.layout.strip_k)
        harmful = most_harmful(values, points, self.layout.strip_k)
        shape = (2, self.layout.n_test, self.layout.strip_k)  # a last strip narrower than k leaves the rest as fill
        indices, ranked = np.full(shape, -1, np.int32), np.full(shape, np.nan, np.float32)
        for end, ranking in enumerate((helpful, harmful)):
            width = ranking.indices.shape[1]
            indices[end, :, :width], ranked[end, :, :width] = ranking
        self._array("strips/index")[i] = indices
        self._array("strips/value")[i] = ranked

    def _write_overview(self, i: int, values: NDArray[np.float32]) -> None:
        columns = self.layout.strip_slice(i)
        if "train_total" not in self._group:  # begun by an older version, which kept neither
            return
        with np.errstate(over="ignore"):
            self._array("train_total")[columns] = values.sum(axis=0, dtype=np.float64).astype(np.float32)
        for level in self.layout.levels:
            first = i * level.cells_per_strip
            self._array(f"overview/{level.name}")[:, first : first + level.cells_per_strip] = strip_cells(level, values)

    def _fold_rankings(self) -> None:
        k, n_test = self.layout.k, self.layout.n_test
        top, bottom = empty_ranking(n_test), empty_ranking(n_test)
        for i in range(self.layout.n_strips):
            helpful, harmful = self._partial_rankings(i)
            top, bottom = merge_helpful(top, helpful, k), merge_harmful(bottom, harmful, k)
        for end, ranking in (("top", top), ("bottom", bottom)):
            self._array(f"{end}_index")[:] = ranking.indices
            self._array(f"{end}_value")[:] = ranking.values

    def _partial_rankings(self, i: int) -> tuple[Ranking, Ranking]:
        columns = self.layout.strip_slice(i)
        width = min(self.layout.strip_k, columns.stop - columns.start)
        indices = np.asarray(self._array("strips/index")[i])[:, :, :width]
        values = np.asarray(self._array("strips/value")[i])[:, :, :width]
        if (indices < columns.start).any() or (indices >= columns.stop).any() or not np.isfinite(values).all():
            raise CorruptStoreError(
                f"the ranking of strip {i} in {self.path} is missing or damaged, expected training points "
                f"{columns.start} to {columns.stop - 1}. Call reopen([{i}]) and write the strip again."
            )
        return Ranking(indices[0], values[0]), Ranking(indices[1], values[1])


def _some(strips: list[int]) -> str:
    return ", ".join(map(str, strips[:5])) + (", …" if len(strips) > 5 else "")
