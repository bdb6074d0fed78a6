"""What is known of the points next to the matrix: labels, class names, self-influences, and the samples themselves.

They lie in the group `samples` of the result, one group per axis, as plain arrays: nothing of them is ever executed.
Text is stored as its UTF-8 bytes, one after the other, with the offsets at which each begins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.codecs import Crc32cCodec

from distinfluence.errors import CorruptStoreError, DtypeError, SettingError, ShapeError
from distinfluence.store.format.folder import COMPLETE, consolidate, local_path, read_attributes, surfaced_errors
from distinfluence.store.format.html import table_as_html
from distinfluence.store.format.layout import Layout
from distinfluence.store.read.guarded_store import is_bounded

Axis = Literal["test", "train"]
KINDS = ("image", "text", "table")
_SAMPLES, _IDS = ("values", "text", "offsets"), ("id", "id_text", "id_offsets")
_KNOWN = ("label", "id", "id_text", "self_influence")
_SAMPLES_PER_CHUNK = 256
_BYTES_PER_CHUNK = 2**20
MAX_NAME = 200  # characters of a class, a column or a block that are read
MAX_ID = 1000  # bytes of an id
MAX_TEXT = 2**16  # bytes of one text that are read; the rest is cut
MAX_SAMPLE = 2**22  # values of one sample that are read


@dataclass(frozen=True)
class Sample:
    """One sample as it is stored.

    Attributes:
        kind: "image", "text" or "table".
        values: The array, or the text.
    """

    kind: str
    values: NDArray[Any] | str


def annotate(
    path: str | os.PathLike[str],
    axis: Axis,
    samples: ArrayLike | Sequence[str] | None = None,
    *,
    kind: Literal["image", "text", "table"] | None = None,
    labels: ArrayLike | None = None,
    classes: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    ids: ArrayLike | Sequence[str] | None = None,
    self_influence: ArrayLike | None = None,
    replace: bool = False,
) -> None:
    """Store what the test or training points of a result are: samples, labels, ids, self-influences.

    What is passed replaces what was stored of it. Everything else is kept, unless `replace`. n is the length of the
    axis.

    Args:
        path: The folder of the result.
        axis: "test" or "train".
        samples: The samples. For kind "image" [n, h, w], [n, h, w, 3] or [n, 3, h, w], uint8 or floats that are scaled
            from the smallest to the largest; for "table" [n, d]; for "text" n strings. Default: unchanged.
        kind: The kind of the samples. Required with `samples`.
        labels: Whole numbers that `classes` names, or numbers to regress on, [n]. Default: unchanged.
        classes: Names of the labels 0, 1, …. Default: unchanged.
        columns: Names of the columns of a table, d of them. Default: unchanged.
        ids: What you call the points: n different strings or whole numbers. Default: unchanged.
        self_influence: Self-influences, [n]. Default: unchanged.
        replace: Whether to delete everything that was stored of this axis first.

    Raises:
        ShapeError: If an array does not fit the axis.
        DtypeError: If samples or labels are not numbers.
        SettingError: If `axis` or `kind` is unknown, or ids are not all different or are too long.
        StoreNotFoundError: If there is nothing at `path`.
        ForeignStoreError: If something else than a result is at `path`.
        StoreError: If the disk is full or cannot be written.
    """
    folder = local_path(path)
    layout = Layout.from_attributes(read_attributes(folder)["layout"])
    if axis not in ("test", "train"):
        raise SettingError(f"`axis` must be 'test' or 'train', got {axis!r}.")
    n = layout.n_test if axis == "test" else layout.n_train
    arrays: dict[str, NDArray[Any]] = {}
    attributes: dict[str, Any] = {}
    if samples is not None:
        attributes["kind"] = kind
        arrays.update(_sample_arrays(samples, kind, n))
        if kind == "image":
            attributes["range"] = _range(arrays["values"])
    if labels is not None:
        arrays["label"] = _numbers("labels", labels, n)
    if classes is not None:
        attributes["classes"] = _names("classes", classes, None)
    if ids is not None:
        arrays.update(_id_arrays(ids, n))
    if self_influence is not None:
        arrays["self_influence"] = _numbers("self_influence", self_influence, n)
    with surfaced_errors("annotate", folder):
        group = zarr.open_group(str(folder), mode="r+", zarr_format=3, use_consolidated=False)
        kept = group.require_group("samples")
        own = kept.create_group(axis, overwrite=True) if replace or axis not in kept else kept.require_group(axis)
        if columns is not None:
            attributes["columns"] = _names("columns", columns, _n_columns(own if samples is None else None, arrays))
        stale = {*(_SAMPLES if samples is not None else ()), *(_IDS if ids is not None else ())}
        for name in sorted(stale & set(own.keys())):
            del own[name]
        for name, values in arrays.items():
            _store(own, name, values, axis)
        rest = {k: v for k, v in own.attrs.items() if samples is None or k not in ("kind", "range", "columns")}
        own.attrs.put({**rest, **attributes})
        if group.attrs.get("state") == COMPLETE:
            consolidate(folder)  # readers take what is consolidated for all that there is


def read_samples(group: zarr.Group, axis: Axis, n: int) -> StoredPoints:
    """Return the stored facts of the n points of an axis; empty if nothing is stored.

    Raises:
        CorruptStoreError: An array cannot be what it is stored as.
    """
    try:
        own = group[f"samples/{axis}"]
    except KeyError:
        return StoredPoints(None, n, group if axis == "train" else None)
    if not isinstance(own, zarr.Group):
        raise CorruptStoreError(f"`samples/{axis}` must be a group, got an array. Call `annotate` again.")
    return StoredPoints(own, n, group if axis == "train" else None)


class StoredPoints:
    """The stored samples, labels, ids and self-influences of one axis, read when asked for.

    Attributes:
        n: Number of points.
        kind: Kind of the samples; None if none are stored.
        classes: Names of the labels 0, 1, …; empty if not stored.
        columns: Names of the columns of a table; empty if not stored.
        range: The values that are black and white in an image.
    """

    def __init__(self, group: zarr.Group | None, n: int, result: zarr.Group | None = None) -> None:
        self._group = group
        self._result = result  # where the run's own self-influences are
        self.n = n
        attributes: dict[str, Any] = {} if group is None else dict(group.attrs)
        kind = attributes.get("kind")
        self.kind = kind if kind in KINDS else None
        self.classes = names_of(attributes.get("classes"))
        self.columns = names_of(attributes.get("columns"))
        self.range = _ends(attributes.get("range"))

    def __repr__(self) -> str:
        said = [*([f"samples of kind {self.kind}"] if self.kind else []), *(n for n in self.names() if n in _KNOWN)]
        return f"<StoredPoints {self.n}, {', '.join(said) or 'nothing stored'}>"

    def _repr_html_(self) -> str:
        """Return what is known of the first points as a table, for notebooks."""
        n = min(self.n, 10)
        labels, columns = self.labels(), dict[str, list[object]]()
        columns["point"] = list(range(n))
        if self.id_of(0) is not None:
            columns["id"] = [self.id_of(i) for i in range(n)]
        if labels is not None:
            columns["label"] = [self.name_of(float(value)) for value in labels[:n]]
        if self.kind == "text":
            columns["text"] = [getattr(self.sample(i), "values", "") for i in range(n)]
        return table_as_html(f"{n} of {self!r}", columns)

    def names(self) -> list[str]:
        """Return the names of the arrays that are stored.

        Returns:
            The names, sorted.
        """
        return [] if self._group is None else sorted(self._group.keys())

    def check(self) -> None:
        """Check that all stored arrays can be read without risk. No values are read.

        Raises:
            CorruptStoreError: If one of them cannot.
        """
        for name in self.names():
            self._array(name)

    def labels(self) -> NDArray[Any] | None:
        """Return the labels.

        Returns:
            The labels, [n]; None if not stored.

        Raises:
            CorruptStoreError: If what is stored cannot be labels.
        """
        return self._per_point("label")

    def self_influence(self) -> NDArray[np.float32] | None:
        """Return the self-influences that `annotate` stored, else those that the run computed.

        Returns:
            The self-influences, [n], NaN where the run has not computed them yet; None if there are none.

        Raises:
            CorruptStoreError: If what is stored cannot be self-influences.
        """
        stored = self._per_point("self_influence")
        if stored is None and self._result is not None and "self_influence" in self._result:
            stored = self._per_point("self_influence", self._result)
        return None if stored is None or np.isnan(stored).all() else stored

    def ids(self) -> NDArray[Any] | None:
        """Return what the points are called.

        Returns:
            Strings or int64, [n]; None if not stored.

        Raises:
            CorruptStoreError: If what is stored cannot be ids.
        """
        if self._has("id"):
            return self._per_point("id")
        if not self._has("id_text"):
            return None
        offsets, text = np.asarray(self._offsets("id_offsets")[:]), np.asarray(self._array("id_text")[:]).tobytes()
        if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(text):
            raise self._corrupt("id_offsets", "ascending offsets into the ids", str(offsets[:5]))
        ends = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        return np.array([_decoded(text[a : min(b, a + MAX_ID)]) for a, b in ends], dtype=np.str_)

    def id_of(self, index: int) -> str | None:
        """Return what one point is called.

        Args:
            index: The point, 0 ≤ index < n.

        Returns:
            The id; None if not stored.

        Raises:
            CorruptStoreError: If what is stored cannot be ids.
        """
        if self._has("id"):
            return str(int(self._array("id")[index]))  # type: ignore[arg-type]
        return self._text("id_text", "id_offsets", index, MAX_ID) if self._has("id_text") else None

    def name_of(self, label: float) -> str:
        """Return a label as it is called.

        Args:
            label: The label.

        Returns:
            The name of its class, else the number as text.
        """
        if float(label).is_integer():
            return self.classes[int(label)] if 0 <= label < len(self.classes) else str(int(label))
        return f"{label:.4g}"

    def sample(self, index: int) -> Sample | None:
        """Return one sample.

        Args:
            index: The point, 0 ≤ index < n.

        Returns:
            The sample; None if samples are not stored.

        Raises:
            CorruptStoreError: If what is stored cannot be a sample.
        """
        if self.kind is None:
            return None
        if self.kind == "text":
            return Sample("text", self._text("text", "offsets", index, MAX_TEXT))
        values = self._array("values")
        dimensions = (2,) if self.kind == "table" else (3, 4)
        if values.ndim not in dimensions or values.shape[0] != self.n:
            raise self._corrupt("values", f"{self.n} samples of kind {self.kind}", str(values.shape))
        if int(np.prod(values.shape[1:])) > MAX_SAMPLE:
            raise self._corrupt("values", f"at most {MAX_SAMPLE} numbers in a sample", str(values.shape))
        return Sample(self.kind, np.asarray(values[index]))

    def _text(self, name: str, offsets_name: str, index: int, limit: int) -> str:
        start, stop = (int(x) for x in np.asarray(self._offsets(offsets_name)[index : index + 2]))
        if not 0 <= start <= stop <= self._array(name).shape[0]:
            raise self._corrupt(offsets_name, "ascending offsets into the text", f"{start}, {stop}")
        encoded = np.asarray(self._array(name)[start : min(stop, start + limit)]).tobytes()
        return _decoded(encoded) + ("…" if stop - start > limit else "")

    def _offsets(self, name: str) -> zarr.Array[Any]:
        array = self._array(name)
        if array.shape != (self.n + 1,):
            raise self._corrupt(name, f"({self.n + 1},)", str(array.shape))
        return array

    def _has(self, name: str) -> bool:
        return self._group is not None and name in self._group

    def _per_point(self, name: str, group: zarr.Group | None = None) -> NDArray[Any] | None:
        if group is None and not self._has(name):
            return None
        array = self._array(name, group)
        if array.shape != (self.n,):
            raise self._corrupt(name, f"({self.n},)", str(array.shape))
        return np.asarray(array[:])

    def _array(self, name: str, group: zarr.Group | None = None) -> zarr.Array[Any]:
        group = self._group if group is None else group
        try:
            array = None if group is None else group[name]
        except KeyError:
            array = None
        if not isinstance(array, zarr.Array):
            raise self._corrupt(name, "an array", "nothing")
        if array.dtype.kind not in "fiub" or _chunk_bytes(array) > 64 * 2**20 or not is_bounded(array):
            raise self._corrupt(name, "numbers in chunks of at most 64 MiB", f"{array.dtype} {array.chunks}")
        return array

    def _corrupt(self, name: str, expected: str, got: str) -> CorruptStoreError:
        where = "" if self._group is None else self._group.path
        return CorruptStoreError(f"`{where}/{name}` must be {expected}, got {got}. Call `annotate` again.")


def _sample_arrays(samples: Any, kind: str | None, n: int) -> dict[str, NDArray[Any]]:
    if kind not in KINDS:
        raise SettingError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}. Say what the samples are.")
    if kind == "text":
        encoded = [str(text).encode() for text in samples]
        if len(encoded) != n:
            raise ShapeError(f"`samples` must be {n} texts, got {len(encoded)}. Pass one per point.")
        return _text_arrays("text", "offsets", encoded)
    values = np.asarray(samples)
    dimensions = (2,) if kind == "table" else (3, 4)
    if values.ndim not in dimensions or values.shape[0] != n or 0 in values.shape:
        raise ShapeError(
            f"`samples` of kind {kind!r} must be {n} arrays of {' or '.join(str(d - 1) for d in dimensions)} "
            f"dimensions, got {values.shape}. Reshape them."
        )
    if values.dtype.kind not in "fiub":
        raise DtypeError(f"`samples` must be numbers, got {values.dtype}. Convert them, or use kind='text'.")
    return {"values": values.astype(np.float32) if values.dtype.kind == "f" else values}


def _text_arrays(name: str, offsets: str, encoded: list[bytes]) -> dict[str, NDArray[Any]]:
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return {offsets: ends, name: np.frombuffer(b"".join(encoded) or b" ", np.uint8)}


def _decoded(encoded: bytes) -> str:
    return encoded.decode("utf-8", errors="replace")


def _id_arrays(ids: Any, n: int) -> dict[str, NDArray[Any]]:
    array = np.asarray(ids)
    if array.shape != (n,):
        raise ShapeError(f"`ids` must be ({n},), one per point, got {array.shape}. Pass a flat list.")
    if np.unique(array).size != n:
        raise SettingError(f"`ids` must all be different, got {np.unique(array).size} different ones of {n}.")
    if array.dtype.kind in "iu":
        return {"id": array.astype(np.int64)}
    encoded = [str(value).encode() for value in array.tolist()]
    longest = max(map(len, encoded))
    if longest > MAX_ID:
        raise SettingError(f"`ids` must have at most {MAX_ID} bytes each, got one of {longest}. Shorten them.")
    return _text_arrays("id_text", "id_offsets", encoded)


def _range(images: NDArray[Any]) -> list[float]:
    """Return the values that are black and white."""
    if images.dtype == np.uint8:
        return [0.0, 255.0]
    low, high = float(images.min()), float(images.max())
    return [low, high] if np.isfinite([low, high]).all() else [0.0, 1.0]


def _numbers(name: str, values: ArrayLike, n: int) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (n,):
        raise ShapeError(f"`{name}` must be ({n},), one per point, got {array.shape}. Pass a flat array.")
    if array.dtype.kind not in "fiub":
        raise DtypeError(f"`{name}` must be numbers, got {array.dtype}. Pass numbers, and their names as `classes`.")
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)


def _names(name: str, values: Sequence[str], expected: int | None) -> list[str]:
    names = [str(value) for value in values]
    if expected is not None and len(names) != expected:
        raise ShapeError(f"`{name}` must be {expected} names, got {len(names)}. Pass one per column of `samples`.")
    return names


def _n_columns(group: zarr.Group | None, arrays: Mapping[str, NDArray[Any]]) -> int:
    values = arrays.get("values") if group is None else group.get("values")
    return values.shape[1] if isinstance(values, np.ndarray | zarr.Array) and values.ndim == 2 else 0


def _store(group: zarr.Group, name: str, values: NDArray[Any], axis: Axis) -> None:
    # named for readers such as xarray; text and its offsets have no entry for each point
    first_name = f"{name}_0" if name.endswith(("text", "offsets")) else axis
    names = (first_name, *(f"{name}_{i}" for i in range(1, values.ndim)))
    first = _BYTES_PER_CHUNK if values.ndim == 1 else _SAMPLES_PER_CHUNK
    chunks = (min(first, values.shape[0]), *values.shape[1:])
    group.create_array(
        name, data=values, chunks=chunks, compressors=[Crc32cCodec()], dimension_names=names, overwrite=True
    )


def names_of(value: object) -> list[str]:
    """Return names from an attribute, each of at most `MAX_NAME` characters: a hostile one could have any number."""
    if not isinstance(value, list):
        return []
    names = [str(each) for each in value[: 2**16]]
    return [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in names]


def _ends(value: object) -> tuple[float, float]:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(x, int | float) for x in value):
        return float(value[0]), float(value[1])
    return 0.0, 1.0


def _chunk_bytes(array: zarr.Array[Any]) -> int:
    return int(np.prod(array.chunks, dtype=np.float64)) * array.dtype.itemsize
