"""sha256 fingerprints of arrays and settings: what says that a resumed run is the run that began.

Equal content gives equal fingerprints whatever the memory layout, byte order or order of names. Arrays are read once,
in pieces; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import DtypeError, SettingError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_PIECE_BYTES = 2**20
_HASHABLE_KINDS = "biufcSUMm"


def fingerprint_array(array: NDArray[np.generic]) -> str:
    """Return the sha256 (hex) of dtype, shape and values in C order.

    Raises:
        DtypeError: The dtype has no plain bytes.
    """
    array = np.asarray(array)
    if array.dtype.kind not in _HASHABLE_KINDS:
        raise DtypeError(
            f"`array` must hold numbers, bools, strings or times, got dtype {array.dtype}. View extension types as "
            "plain integers first (bfloat16 as uint16)."
        )
    dtype = array.dtype.newbyteorder("<")
    digest = hashlib.sha256(canonical_json(["array", dtype.str, list(array.shape)]).encode())
    if array.flags.c_contiguous and array.dtype == dtype:
        digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()
    pieces = np.nditer(
        array,
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_dtypes=[dtype],
        casting="equiv",
        order="C",
        buffersize=max(1, _PIECE_BYTES // max(1, dtype.itemsize)),
    )
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return digest.hexdigest()


def fingerprint_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """Return the sha256 (hex) of named arrays, such as a model's parameters; the order of names does not matter."""
    return combine({name: fingerprint_array(array) for name, array in arrays.items()})


def fingerprint_settings(settings: object) -> str:
    """Return the sha256 (hex) of settings made of JSON values.

    Raises:
        SettingError: `settings` holds anything else.
    """
    return hashlib.sha256(canonical_json(["settings", settings]).encode()).hexdigest()


def combine(fingerprints: Mapping[str, str]) -> str:
    """Return one fingerprint (hex) of several named ones; their order does not matter."""
    return hashlib.sha256(canonical_json(["combined", fingerprints]).encode()).hexdigest()


def canonical_json(value: object) -> str:
    """Return JSON text that is the same for equal values: sorted keys, no spaces, ASCII.

    Raises:
        SettingError: `value` is not made of JSON values.
    """
    return json.dumps(to_json(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_json(value: object, where: str) -> Json:
    """Return `value` in JSON's own types: tuples become lists, NumPy scalars become Python's.

    Raises:
        SettingError: `value` is not made of JSON values; the message names `where`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SettingError(
                f"`{where}` must be finite, got {value}. JSON has no such number; pass a string or None."
            )
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SettingError(f"`{where}` must have strings as keys, got {key!r}. Pass str(key).")
        return {key: to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise SettingError(
        f"`{where}` must be made of JSON values, got {type(value).__name__}. Pass numbers, strings, lists and mappings."
    )
