"""Arrays of every library: what is taken, what is refused, and their samples as tensors.

pandas, dask, zarr and NumPy are looked up where they have been imported: nobody who has none of their arrays pays for
them.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.errors import ChunkError, DtypeError, EmptyDataError, ShapeError
from distinfluence.model.batch import Batch, common_length, some
from distinfluence.model.checks.supported import check_tensor
from distinfluence.model.data.refused import is_of, no_data
from distinfluence.model.data.samples import PIECE, Samples
from distinfluence.model.data.tree import map_leaves, named_leaves

NUMBERS = "biufc"  # kinds of NumPy's dtypes


def is_dask_array(data: object) -> bool:
    """Return whether this is a dask array, which only a process that has imported `dask.array` can hold.

    Workers and runs of other data do not import it: that takes almost a second of CPU where xarray is installed.
    """
    return is_of(data, "dask.array", "Array")


def is_array(value: object) -> bool:
    """Return whether this is an array of a library that is known here."""
    return (
        isinstance(value, Tensor)
        or is_of(value, "numpy", "ndarray", "generic")
        or is_of(value, "pandas", "DataFrame", "Series")
        or is_of(value, "zarr", "Array")
        or is_dask_array(value)
    )


def is_number(value: object) -> bool:
    """Return whether this is a number of Python or NumPy, or a tensor without dimensions."""
    return isinstance(value, (bool, int, float, complex)) or (
        is_array(value) and getattr(value, "shape", None) == torch.Size([])
    )


def holds_numbers(value: object) -> bool:
    """Return whether this is a list of Python's numbers, or of such lists."""
    return type(value) is list and (all(type(v) in (bool, int, float) for v in value) or all(map(holds_numbers, value)))


def tensor_of_list(values: Any, name: str) -> Tensor:
    """Return the tensor of a number or of nested lists of numbers.

    Raises:
        DtypeError: If a whole number is too large for int64.
        ShapeError: If lists differ in length.
    """
    try:
        return torch.tensor(values)
    except (ValueError, RuntimeError) as error:
        if "verflow" in str(error):
            raise DtypeError(
                f"`{name}` must hold whole numbers below 2⁶³ in size, got a larger one. Convert them to floats."
            ) from None
        raise ShapeError(
            f"`{name}` must have lists of one length, got others. Pad them, for instance in a "
            "`DataLoader(…, collate_fn=…)`."
        ) from None


def tensor_of(array: Any, name: str = "data") -> Tensor:
    """Return a tensor of an array's values, sharing memory where the array is writable.

    Raises:
        DtypeError: If the array holds anything but numbers.
    """
    if isinstance(array, Tensor):
        return array
    if array.dtype.kind not in NUMBERS:
        raise DtypeError(f"`{name}` must hold numbers, got dtype {array.dtype}. Encode strings and objects as numbers.")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    steps_fit = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    apart = array.flags.writeable and steps_fit
    try:
        return torch.from_numpy(array if apart else array.copy())
    except TypeError as error:
        raise DtypeError(f"`{name}` must have a dtype that torch has, got {array.dtype}. Convert it.") from error


def arrays(parts: Mapping[str, Any], order: Tensor | None = None, sizes: tuple[int, ...] | None = None) -> "Arrays":
    """Return arrays as samples.

    Args:
        parts: Name in errors → arrays: one whole batch, or inputs and targets.
        order: The samples that are meant, int64 [n]; all of them if None.
        sizes: The batches that they come in.

    Returns:
        The samples.
    """
    _check_indexes([pair for name, data in parts.items() for pair in named_leaves(data, name)])
    trees = {name: formed(data, name) for name, data in parts.items()}
    columns = dict(pair for name, tree in trees.items() for pair in named_leaves(tree, name))
    whole = next(iter(trees.values())) if len(trees) == 1 else tuple(trees.values())
    return Arrays(whole, columns, order, sizes)


def _check_indexes(leaves: list[tuple[str, Any]]) -> None:
    """Raise ShapeError where pandas would pair other rows than their positions do."""
    frames = [(name, leaf) for name, leaf in leaves if is_of(leaf, "pandas", "DataFrame", "Series")]
    for name, frame in frames[1:]:
        if len(frame) == len(frames[0][1]) and not frame.index.equals(frames[0][1].index):
            raise ShapeError(
                f"`{frames[0][0]}` and `{name}` must have the same index, got others: their rows would be paired by "
                "position. Align them, or call `reset_index(drop=True)` on both."
            )


def formed(data: Any, name: str) -> Any:
    """Return data as a tree of arrays that can be sliced: tensors, NumPy, zarr and dask arrays.

    Lists of numbers become tensors, pandas' frames and series become NumPy arrays.

    Raises:
        DtypeError: Something in it is not an array of numbers; the message names it.
        ShapeError: An array has no dimension for the samples.
    """
    if isinstance(data, Mapping):
        return {str(key): formed(value, f"{name}[{key!r}]") for key, value in data.items()}
    if isinstance(data, (tuple, list)) and not (isinstance(data, list) and holds_numbers(data)):
        return tuple(formed(value, f"{name}[{index}]") for index, value in enumerate(data))
    return _leaf(data, name)


def _leaf(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return tensor_of_list(value, name)
    if not is_array(value):
        raise no_data(value, name)
    if is_of(value, "pandas", "DataFrame", "Series"):
        return _of_pandas(value, name)
    if not isinstance(value, Tensor):
        if is_of(value, "numpy.ma", "MaskedArray"):
            raise DtypeError(f"`{name}` must not be masked. Fill its values, for instance with `.filled(…)`.")
        if value.dtype.kind not in NUMBERS:
            raise DtypeError(
                f"`{name}` must hold numbers, got dtype {value.dtype}. Encode strings and objects as numbers."
            )
    else:
        check_tensor(value, name)
    if not value.ndim:
        raise ShapeError(
            f"`{name}` must have the samples along its first dimension, got a scalar. Pass batches of samples."
        )
    return value


def _of_pandas(value: Any, name: str) -> Any:
    pandas: Any = sys.modules["pandas"]
    numpy: Any = sys.modules["numpy"]
    frame = value.to_frame() if isinstance(value, pandas.Series) else value
    columns = list(zip(frame.columns, frame.dtypes, strict=True))
    odd = [f"{column!r} ({dtype})" for column, dtype in columns if not pandas.api.types.is_numeric_dtype(dtype)]
    if odd:
        raise DtypeError(
            f"`{name}` must have columns of numbers, got {some(odd)}. Encode these as numbers, or drop them."
        )
    if not columns:
        raise EmptyDataError(f"`{name}` must have at least one column, got none.")
    missing = bool(frame.isna().to_numpy().any())
    own = [getattr(dtype, "numpy_dtype", getattr(dtype, "subtype", dtype)) for _, dtype in columns]
    kind = numpy.result_type(*own)
    kind = numpy.result_type(kind, numpy.float64) if missing and kind.kind in "biu" else kind
    parts = [
        frame.iloc[:, i].to_numpy(dtype=kind, na_value=numpy.nan)
        if missing
        else frame.iloc[:, i].to_numpy().astype(kind)
        for i in range(len(columns))
    ]
    return parts[0] if value is not frame else numpy.stack(parts, axis=1)


class Arrays(Samples):
    """Arrays with the samples along their first dimension.

    Args:
        tree: Tensors, NumPy, zarr or dask arrays, as `formed` returns them.
        columns: The same arrays, each under its name in errors.
        order: The samples that are meant, int64 [n]; all of them if None.
        sizes: The batches that they come in.
    """

    def __init__(
        self, tree: Any, columns: Mapping[str, Any], order: Tensor | None, sizes: tuple[int, ...] | None
    ) -> None:
        self.tree, self.order = tree, order
        dask = _dask_sizes(columns)
        length = common_length({name: int(leaf.shape[0]) for name, leaf in columns.items()})
        name = next(iter(columns))
        super().__init__(name, length if order is None else len(order), sizes if dask is None else dask)
        self._piece = len(self) if all(map(_is_in_memory, columns.values())) else PIECE

    @override
    def read(self, start: int, stop: int) -> Batch:
        whole = self.order is None and start == 0 and stop == len(self)
        rows: Any = slice(start, stop) if self.order is None else self.order[start:stop]
        batch: Batch = map_leaves(lambda leaf: _piece(leaf, None if whole else rows, self.name), self.tree)
        return batch

    @override
    def edges(self) -> Iterator[tuple[int, int]]:
        return super().edges() if self.sizes is not None else self.cut(self._piece)


def _piece(leaf: Any, rows: Any, name: str) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf if rows is None else leaf[rows]
    if isinstance(rows, Tensor):
        rows = rows.numpy()
    part = leaf[slice(None) if rows is None else rows]
    return tensor_of(part.compute() if is_dask_array(part) else part, name)


def _is_in_memory(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) or (is_of(leaf, "numpy", "ndarray") and not is_of(leaf, "numpy", "memmap"))


def _dask_sizes(columns: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the chunks of dask arrays along the samples. Raises ChunkError where they do not line up."""
    dask = [name for name, leaf in columns.items() if is_dask_array(leaf)]
    if not dask:
        return None
    other = next((name for name in columns if name not in dask), None)
    if other is not None:
        raise ChunkError(
            f"`{other}` must be a dask array as the others are, got {type(columns[other]).__name__}. Call "
            "`dask.array.from_array(…, chunks=…)` with the same chunks along the samples."
        )
    unknown = next((name for name, leaf in columns.items() if any(size != size for size in leaf.chunks[0])), None)
    if unknown is not None:
        raise ChunkError(f"`{unknown}` must have known chunk sizes. Call `compute_chunk_sizes()` on it.")
    common_length({name: int(leaf.shape[0]) for name, leaf in columns.items()})
    chunks = {name: tuple(int(size) for size in leaf.chunks[0]) for name, leaf in columns.items()}
    first = chunks[dask[0]]
    odd = next((name for name, sizes in chunks.items() if sizes != first), None)
    if odd is not None:
        raise ChunkError(
            f"`{dask[0]}` and `{odd}` must have the same chunks along the samples, got {first[:10]} and "
            f"{chunks[odd][:10]}. Call `{odd}.rechunk({{0: {dask[0]}.chunks[0]}})`."
        )
    if 0 in first:
        raise EmptyDataError(f"`{dask[0]}` must have samples in every chunk, got chunks {first[:10]}.")
    return first
