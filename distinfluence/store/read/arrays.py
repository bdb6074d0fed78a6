"""The arrays of a result as they lie on the disk: each is checked against the layout before it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from distinfluence.errors import CorruptStoreError, DistinfluenceError
from distinfluence.store.format.contribution_layout import spec_of
from distinfluence.store.format.folder import COMPLETE, RUNNING, Location, read_attributes, surfaced_errors
from distinfluence.store.format.layout import Layout, array_specs
from distinfluence.store.format.remote import RemoteStore
from distinfluence.store.read.annotations import Axis, StoredPoints, names_of, read_samples
from distinfluence.store.read.guarded_store import GuardedStore, checked, is_bounded, largest_file, open_to_read


class ResultArrays:
    """A result, open for reading: its layout, its attributes and its arrays.

    Attributes:
        path: The folder, or the URL.
        layout: The cut of the result into strips.
        provenance: What the run recorded, as of opening.
    """

    def __init__(self, path: Location) -> None:
        attributes = read_attributes(path)
        self.path = path
        self.layout = _layout_of(attributes, path)
        self.provenance: Mapping[str, Any] = MappingProxyType(attributes)
        self._specs = {spec.name: spec for spec in array_specs(self.layout)}
        with surfaced_errors("open", path):
            self._group, self._store = open_to_read(path)
        if isinstance(self._store, GuardedStore):
            self._store.largest = largest_file(self._specs.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix: (n_test, n_train, *input_shape)."""
        return self.layout.shape

    @property
    def complete(self) -> bool:
        """Whether the run had finished when the result was opened."""
        return bool(self.provenance["state"] == COMPLETE)

    @property
    def n_missing(self) -> int:
        """Number of strips that are not written yet."""
        return self.layout.n_strips - int(self.finished_strips().sum())

    @property
    def store(self) -> GuardedStore | RemoteStore:
        """The zarr store that the result is read from, read-only."""
        return self._store

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Read a tile of the influences, such as `result[i]` or `result[i, a:b]`.

        Args:
            key: Rows and columns, as NumPy takes them.

        Returns:
            The influences of the tile; NaN where strips are missing.

        Raises:
            CorruptStoreError: If the bytes on the disk are not those that were written.
            StoreError: If the folder or the server cannot be read.
        """
        return self.read("influences", key)

    def read(self, name: str, key: Any = slice(None)) -> NDArray[Any]:
        """Read an array of the layout, or a part of it.

        Args:
            name: Name of the array below the result, such as `train_loss`.
            key: The part to read, as NumPy takes it. Default: all of it.

        Returns:
            The values.

        Raises:
            CorruptStoreError: If the array is missing, is not what the layout says, or is damaged.
            StoreError: If the folder or the server cannot be read.
        """
        array = self._array(name)
        with surfaced_errors("read", self.path):
            return np.asarray(array[key])

    def rows(self, rows: NDArray[np.int64], columns: slice) -> NDArray[np.float32]:
        """Read some rows of a range of columns. Only the chunks that hold them are read.

        Args:
            rows: Test points, sorted, counted from 0.
            columns: A range of training points.

        Returns:
            The influences, [n, m, *input_shape]; NaN where strips are missing.

        Raises:
            CorruptStoreError: If the bytes on the disk are not those that were written.
            StoreError: If the folder or the server cannot be read.
        """
        if rows[-1] - rows[0] + 1 == rows.size:
            return self[int(rows[0]) : int(rows[-1]) + 1, columns]
        array = self._array("influences")
        with surfaced_errors("read", self.path):
            return np.asarray(array.oindex[rows, columns])

    def finished_strips(self) -> NDArray[np.bool_]:
        """Read which strips are written.

        Returns:
            A mask, [n_strips].

        Raises:
            CorruptStoreError: If the marks are damaged.
        """
        finished: NDArray[np.bool_] = self.read("strip_status") == 1
        return finished

    def points(self, axis: Axis) -> StoredPoints:
        """Return labels, ids and samples of the points of one axis, as `annotate` stored them.

        Args:
            axis: "test" or "train".

        Returns:
            The stored points; empty if nothing is stored.

        Raises:
            CorruptStoreError: If what is stored is not a group.
        """
        with surfaced_errors("read", self.path):
            return read_samples(self._group, axis, self.layout.n_test if axis == "test" else self.layout.n_train)

    def overview(self, name: str, columns: slice) -> NDArray[np.float32]:
        """Read cells of an overview, all rows of them.

        Args:
            name: "coarse" or "fine"; see `layout.levels`.
            columns: A range of columns, counted in cells.

        Returns:
            The cells, [rows of cells, columns of cells].

        Raises:
            CorruptStoreError: If the overview is missing or damaged.
        """
        return self.read(f"overview/{name}", (slice(None), columns))

    @property
    def contribution_blocks(self) -> list[str]:
        """Names of the blocks (layers) of `contributions`; empty if the run stored none."""
        if not self.layout.ranked or not self.has("contributions"):
            return []
        return names_of(self._own_group("contributions").attrs.get("blocks"))

    @property
    def n_contributions(self) -> int:
        """Number of pairs at each end of a ranking that have contributions; 0 if the run stored none."""
        return int(self.contribution_array("top").shape[1]) if self.contribution_blocks else 0

    @property
    def has_token_contributions(self) -> bool:
        """Whether contributions by position of the training sample are stored as well."""
        return self.has("contributions/top_tokens")

    def contribution_array(self, name: str) -> zarr.Array[Any]:
        """Return an array of contributions, checked but not yet read.

        Args:
            name: "top", "bottom", "top_tokens" or "bottom_tokens".

        Returns:
            The array, [n_test, k', n_blocks] or [n_test, k', n_tokens].

        Raises:
            CorruptStoreError: If the array is missing or is not what the layout allows.
        """
        name = f"contributions/{name}"
        array = self._own_array(name)
        return checked(array, spec_of(name, array, len(self.contribution_blocks), self.layout, self.path), self.path)

    def lost_strips(self) -> list[int]:
        """Find the marked strips whose file is gone. Looks at the folder only; `damaged_strips` reads everything.

        Returns:
            Their indices, ascending.

        Raises:
            CorruptStoreError: If the marks are damaged.
        """
        tail = "/0" * len(self.layout.input_shape)
        marked = np.flatnonzero(self.finished_strips()).tolist()
        return [i for i in marked if not self.path.has(f"influences/c/0/{i}{tail}")]

    def expanding_arrays(self) -> list[str]:
        """Find the arrays whose codecs may expand to any size; the writer makes none. Damaged arrays do not count.

        Returns:
            Their names.
        """
        found = []
        for name in self._specs:
            with contextlib.suppress(CorruptStoreError):  # which reading it raises
                if self.has(name) and not is_bounded(self._array(name)):
                    found.append(name)
        return found

    def damaged_strips(self) -> list[int]:
        """Find the marked strips whose bytes are not those that were written. Reads the whole matrix, in strips.

        Returns:
            Their indices, ascending.

        Raises:
            CorruptStoreError: If the marks are damaged.
        """
        damaged = []
        for i in np.flatnonzero(self.finished_strips()):
            try:
                if not np.isfinite(self.read("influences", (slice(None), self.layout.strip_slice(int(i))))).all():
                    damaged.append(int(i))
            except CorruptStoreError:
                damaged.append(int(i))
        return damaged

    def check_arrays(self) -> None:
        """Check that each array at the root is what the layout says. No values are read.

        Raises:
            CorruptStoreError: If one of them is not.
        """
        for name in self._specs:
            if "/" not in name and self.has(name):
                self._array(name)

    def has(self, name: str) -> bool:
        """Check whether an array or group is stored.

        Args:
            name: Its name below the result.

        Returns:
            Whether it is.
        """
        return self.path.has(f"{name}/zarr.json")  # zarr's own look raises for metadata that are torn

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


def _layout_of(attributes: Mapping[str, Any], path: Location) -> Layout:
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
