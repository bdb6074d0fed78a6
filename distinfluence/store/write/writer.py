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
from numpy.typing import NDArray

from distinfluence.errors import CorruptStoreError, IncompleteResultError
from distinfluence.store.format.fingerprint import to_json
from distinfluence.store.format.folder import (
    COMPLETE,
    RUNNING,
    consolidate,
    place_of,
    put_in_place,
    read_attributes,
    surfaced_errors,
)
from distinfluence.store.format.layout import Layout
from distinfluence.store.format.ranking import Ranking
from distinfluence.store.format.remote import RemoteFolder
from distinfluence.store.write.resume import check_resumable
from distinfluence.store.write.schema import build, stored_attributes
from distinfluence.store.write.strips import StripFiles
from distinfluence.store.write.values import check_rows, per_point, require_finite, rounded, rounded_up, strip_values

QUARANTINED = 2  # in `strip_status`: tried and failed; 1 is whole, 0 not made yet

TEST_ARRAYS = ("test_loss", "test_gradient_norm", "relative_residual", "iterations", "converged", "error_bound")
RANKING_ARRAYS = tuple(f"{end}_{what}" for end in ("top", "bottom") for what in ("index", "value"))
_DRIVER_CHUNKS = [
    *((name, "0/0") for name in RANKING_ARRAYS),
    *((name, "0") for name in TEST_ARRAYS),
]


class InfluenceWriter(StripFiles):
    """A result on disk, open for writing. Make one with `create`, `open` or `resume`; it is pickled as its path.

    Any number of processes may call `write_strip` at once, for different strips. `create`, `write_test`, `reopen` and
    `finish` are for the one process that drives the run.

    Attributes:
        path: The folder, or the URL.
        layout: The cut of the result into strips.
    """

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        layout: Layout,
        attributes: Mapping[str, object],
        *,
        overwrite: bool = False,
    ) -> InfluenceWriter:
        """Make an empty result and open it.

        Args:
            path: A folder, or a URL that fsspec can write to.
            layout: The cut of the result into strips.
            attributes: JSON values to store. `resume` compares `fingerprints` (name → hex), and others if asked to.
            overwrite: Whether to replace a result that is there.

        Returns:
            The writer.

        Raises:
            ForeignStoreError: If something else is at `path`. Nothing is touched.
            StoreExistsError: If a result is at `path` and not `overwrite`.
            SettingError: If `attributes` are not JSON, or use a name that the store needs.
            StoreError: If the folder cannot be written.
        """
        folder = place_of(path)
        stored = stored_attributes(layout, attributes)
        with put_in_place(folder, overwrite) as new:
            build(new, layout, stored)
        return cls(folder, layout)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> InfluenceWriter:
        """Open an existing result for writing.

        Args:
            path: A folder, or a URL that fsspec can write to.

        Returns:
            The writer.

        Raises:
            StoreNotFoundError: If there is nothing at `path`.
            ForeignStoreError: If something else than a result is at `path`.
            StoreError: If a newer version wrote the result, or it cannot be read.
        """
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
        """Open a result to continue the run that began it.

        Args:
            path: A folder, or a URL that fsspec can write to.
            layout: The layout that the result must have.
            fingerprints: The fingerprints (name → hex) that it must have, no more and no fewer.
            settings: Attributes that must agree, such as {"solver": {...}}. Default: none.

        Returns:
            The writer.

        Raises:
            FingerprintError: If anything differs; the message names every difference.
            StoreNotFoundError: If there is nothing at `path`.
            ForeignStoreError: If something else than a result is at `path`.
            StoreError: If a newer version wrote the result, or it cannot be read.
        """
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
        """Write what is known of some test points. One process at a time.

        An array whose file was torn loses its other rows: write all of them again.

        Args:
            rows: The test points, a range. Each array has one value for each of them, [rows].
            loss: Losses, finite.
            gradient_norm: Norms of the gradients, finite.
            relative_residual: Residuals, relative to the norm of the right-hand side; NaN where not known.
            iterations: Iterations of the solver.
            converged: Whether the row converged.
            error_bound: c_i with |stored − exact| ≤ c_i·‖g_j‖ for every training point j; rounded up to float32.

        Raises:
            SettingError: If `rows` has a step.
            IndexRangeError: If `rows` are empty or out of range.
            ShapeError: If an array does not have one value per row.
            DtypeError: If an array is of the wrong kind.
            NonFiniteError: If a loss or norm is not finite.
            StoreError: If the disk is full or cannot be written.
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
        """Check that everything `write_test` writes is there for every test point, undamaged.

        Returns:
            Whether it is.
        """
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
        """Write a strip and mark it, unless it is marked already: the first writer wins, so backup tasks are harmless.

        Args:
            i: The strip.
            values: Influences, [n_test, n_i, *input_shape], finite. Stored as float32.
            loss: Losses of the strip's training points, [n_i]. Default: not recorded.
            gradient_norm: Norms of their gradients, [n_i]. Default: not recorded.

        Returns:
            Whether this call wrote the strip.

        Raises:
            IndexRangeError: If there is no such strip.
            ShapeError: If an array has another shape.
            DtypeError: If an array is of the wrong kind.
            NonFiniteError: If a value is not finite in float32.
            StoreError: If the disk is full or cannot be written. The strip then stays unmarked.
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
        """Write the self-influences of a strip's training points.

        Args:
            i: The strip.
            values: Self-influences, [n_i], finite.
            error: Their error bounds, [n_i]; NaN where there is none. Rounded up to float32.

        Raises:
            IndexRangeError: If there is no such strip.
            ShapeError: If an array does not have one value per point.
            DtypeError: If an array is not floating point.
            NonFiniteError: If a self-influence is not finite.
            StoreError: If the disk is full or cannot be written.
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
        """Return the strips whose training points have no self-influences yet.

        Returns:
            Their indices, ascending.
        """
        return [i for i in range(self.layout.n_strips) if not self.path.has(f"self_influence/c/{i}")]

    def rankings(self, k: int) -> tuple[Ranking, Ranking]:
        """Return the stored rankings of a finished result.

        Args:
            k: How many training points of each, at most as many as are stored.

        Returns:
            The most helpful and the most harmful training points, [n_test, k] each.

        Raises:
            CorruptStoreError: If the rankings are missing or damaged.
        """
        with surfaced_errors("read", self.path):
            top, bottom = (
                Ranking(np.asarray(self._array(f"{end}_index")[:, :k]), np.asarray(self._array(f"{end}_value")[:, :k]))
                for end in ("top", "bottom")
            )
        for ranking in (top, bottom):
            if (ranking.indices < 0).any() or (ranking.indices >= self.layout.n_train).any():
                raise CorruptStoreError(f"the rankings of {self.path} are missing or damaged. Call `finish` again.")
        return top, bottom

    def note(self, seconds: Mapping[str, float], attributes: Mapping[str, object] | None = None) -> None:
        """Add work that was done after `finish` to the summary.

        Args:
            seconds: Seconds by stage.
            attributes: Attributes to set, JSON values. Default: none.

        Raises:
            SettingError: If a value is not JSON.
            StoreError: If the disk is full or cannot be written.
        """
        with surfaced_errors("write to", self.path):
            summary = dict(read_attributes(self.path).get("summary") or {})
            before = summary.get("seconds") or {}
            summary["seconds"] = {**{name: round(value, 3) for name, value in seconds.items()}, **before}
            for name, value in {"summary": summary, **(attributes or {})}.items():
                self._group.attrs[name] = to_json(value, name)
            consolidate(self.path)

    def pending(self) -> list[int]:
        """Return the strips still to be written: not marked, or marked with their shard gone from the disk.

        Returns:
            Their indices, ascending.
        """
        with surfaced_errors("read", self.path):
            status = np.asarray(self._array("strip_status")[:])
            # what lies behind a URL does not vanish in a power failure, and is slow to be asked for one by one
            there = isinstance(self.path, RemoteFolder)
            return [i for i in range(self.layout.n_strips) if status[i] != 1 or not (there or self._has_shard(i))]

    def reopen(self, strips: Iterable[int], arrays: Iterable[str] = ()) -> None:
        """Unmark and delete strips, damaged ones for example; the result is then running again.

        Args:
            strips: The strips.
            arrays: Arrays of test points or rankings to delete. What `write_test` writes is to be written again;
                `finish` folds the rankings again. `find_damage` finds both strips and arrays.

        Raises:
            IndexRangeError: If there is no such strip.
            StoreError: If the folder cannot be written.
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
        """Note strips that cannot be made. They stay pending; readers can say why.

        Args:
            reasons: The reason for each strip.

        Raises:
            StoreError: If the folder cannot be written.
        """
        with surfaced_errors("write to", self.path):
            for i in reasons:
                self._mark(i, QUARANTINED)
            self._group.attrs["quarantined"] = {str(i): reason for i, reason in reasons.items()}

    def finish(self, summary: Mapping[str, object] | None = None) -> None:
        """Fold the rankings of the strips, consolidate the metadata, and mark the result complete.

        Can be called again, also after a kill.

        Args:
            summary: JSON values that are only known at the end, such as seconds by stage. Default: none.

        Raises:
            IncompleteResultError: If strips are pending.
            CorruptStoreError: If the ranking of a strip is missing or damaged.
            SettingError: If `summary` is not JSON.
            StoreError: If the disk is full or cannot be written.
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

    def is_done(self, i: int) -> bool:
        """Check that a strip is marked and its shard is there.

        Args:
            i: The strip.

        Returns:
            Whether it is.
        """
        return bool(np.asarray(self._array("strip_status")[i]) == 1) and self._has_shard(i)


def _some(strips: list[int]) -> str:
    return ", ".join(map(str, strips[:5])) + (", …" if len(strips) > 5 else "")
