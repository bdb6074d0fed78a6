"""What a writer is given, checked and brought into the form in which it is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import DtypeError, IndexRangeError, NonFiniteError, SettingError, ShapeError
from distinfluence.store.format.layout import FLOAT32_BITS


def rounded(values: NDArray[np.float32], mantissa_bits: int) -> NDArray[np.float32]:
    """Round to `mantissa_bits` bits of mantissa, ties to even; the relative error is at most 2^-(bits + 1)."""
    drop = FLOAT32_BITS - mantissa_bits
    if drop == 0:
        return values
    raw = np.ascontiguousarray(values).view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1) + ((raw >> np.uint32(drop)) & np.uint32(1))
    nearest: NDArray[np.float32] = ((raw + half) >> np.uint32(drop) << np.uint32(drop)).view(np.float32)
    return nearest


def strip_values(i: int, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the values of strip i as float32.

    Raises:
        ShapeError: The values have another shape.
        DtypeError: The values are not floating point.
        NonFiniteError: A value is not finite.
    """
    values = np.asarray(values)
    if values.shape != shape:
        raise ShapeError(
            f"`values` of strip {i} must be {shape}, got {values.shape}. Pass all test points by its points."
        )
    if values.dtype.kind != "f":
        raise DtypeError(f"`values` of strip {i} must be floating point, got {values.dtype}. Convert to float32.")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    require_finite(f"values of strip {i}", values)
    return values


def per_point(
    name: str, values: NDArray[Any] | None, n: int, kinds: str, dtype: type[np.generic]
) -> NDArray[Any] | None:
    """Return one value per point, [n], as `dtype`; None stays None.

    Raises:
        ShapeError: There is not one value per point.
        DtypeError: The values are of the wrong kind.
    """
    if values is None:
        return None
    values = np.asarray(values)
    if values.shape != (n,):
        raise ShapeError(f"`{name}` must be ({n},), one value per point, got {values.shape}. Pass a flat array.")
    if values.dtype.kind not in kinds:
        raise DtypeError(f"`{name}` must convert to {dtype.__name__}, got {values.dtype}. Convert it first.")
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def rounded_up(values: NDArray[Any] | None) -> NDArray[np.float32] | None:
    """Return the smallest float32 numbers that are not below these."""
    if values is None:
        return None
    nearest = values.astype(np.float32)
    return np.where(nearest < values, np.nextafter(nearest, np.float32(np.inf)), nearest)


def require_finite(name: str, values: NDArray[Any] | None) -> None:
    """Check that all values are finite.

    Raises:
        NonFiniteError: A value is not finite; the message names the first.
    """
    # The extremes carry NaN and infinity along and need no mask as large as the strip.
    if values is None or (np.isfinite(values.min()) and np.isfinite(values.max())):
        return
    first = tuple(int(d) for d in np.argwhere(~np.isfinite(values))[0])
    raise NonFiniteError(
        f"`{name}` must be finite in float32, got {values[first]} at {list(first)}. Look for "
        "diverged solves, overflow in half precision, or bad samples."
    )


def check_rows(rows: slice, n_test: int) -> int:
    """Return the number of rows of the slice.

    Raises:
        SettingError: The slice has a step.
        IndexRangeError: The slice is empty or out of range.
    """
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise SettingError(f"`rows` must be a slice without step, got {rows!r}. Pass slice(start, stop).")
    start, stop = rows.start or 0, n_test if rows.stop is None else rows.stop
    if not 0 <= start < stop <= n_test:
        raise IndexRangeError(
            f"`rows` must lie within 0 to {n_test} and not be empty, got {rows!r}. Pass a range of rows."
        )
    return int(stop - start)
