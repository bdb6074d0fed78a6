"""The arrays and files of a result, strip by strip, as a writer fills them."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from distinfluence.errors import CorruptStoreError
from distinfluence.store.format.folder import Location, surfaced_errors
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
from distinfluence.store.write.schema import create_array

BY_STRIP = ("train_loss", "train_gradient_norm", "train_total", "self_influence", "self_influence_error")


class StripFiles:
    """A result, open for writing: what a strip adds to its arrays, and which files those are."""

    def __init__(self, path: Location, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        with surfaced_errors("open", path):
            self._group = zarr.open_group(path.writable_store(), mode="r+", use_consolidated=False)
        self._arrays: dict[str, zarr.Array[Any]] = {}

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

    def _mark(self, i: int, status: int) -> None:
        self._array("strip_status")[i] = status
        self.path.settle([f"strip_status/c/{i}"])

    def _delete_chunks(self, i: int) -> None:
        self.path.delete(self._keys_of(i))

    def _has_shard(self, i: int) -> bool:
        return self.path.has(self._keys_of(i)[0])

    def _keys_of(self, i: int) -> list[str]:
        """Return the files of a strip, its shard first."""
        shard = "/".join(["influences/c/0", str(i), *("0" for _ in self.layout.input_shape)])
        per_point = [f"{name}/c/{i}" for name in BY_STRIP]
        overviews = [f"overview/{level.name}/c/0/{i}" for level in self.layout.levels]
        return [shard, *per_point, *(f"strips/{name}/c/{i}/0/0/0" for name in ("index", "value")), *overviews]
