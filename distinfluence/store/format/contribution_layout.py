"""The arrays that hold a score's contributions by block and by token."""

from __future__ import annotations

from typing import Any

import zarr
from numpy.typing import NDArray

from distinfluence.errors import CorruptStoreError, SettingError
from distinfluence.store.format.folder import Location
from distinfluence.store.format.layout import CHUNK_ROWS, ArraySpec, Layout
from distinfluence.store.format.ranking import End

ENDS: tuple[End, End] = ("top", "bottom")
MAX_BLOCKS, MAX_TOKENS = 2**16, 2**20
_VALUES_PER_CHUNK = 2**18  # 1 MiB of float32
_NAN = float("nan")


def contribution_specs(
    layout: Layout, k: int, n_blocks: int, tokens: NDArray[Any] | zarr.Array[Any] | None
) -> dict[str, ArraySpec]:
    """Return the spec of each array by name.

    Args:
        layout: The layout of the result.
        k: How many ranked pairs have contributions.
        n_blocks: The number of blocks of parameters.
        tokens: An array [n_test, k, n_tokens], or None.

    Raises:
        SettingError: The result has mode `perturbation`, or there are too many blocks or tokens.
    """
    if not layout.ranked:
        raise SettingError("`contributions` are of influences of mode 'up'; this result has those of inputs.")
    if not 1 <= n_blocks <= MAX_BLOCKS:
        raise SettingError(f"`blocks` must be from 1 to {MAX_BLOCKS} names, got {n_blocks}. Join some of them.")
    widths = {"": (n_blocks, "block")}
    if tokens is not None:
        n_tokens = int(tokens.shape[-1]) if tokens.ndim == 3 else 0
        if not 1 <= n_tokens <= MAX_TOKENS:
            raise SettingError(f"`tokens` must be from 1 to {MAX_TOKENS} positions, got {tokens.shape}.")
        widths["_tokens"] = (n_tokens, "token")
    specs = {}
    for end in ENDS:
        for suffix, (width, dim) in widths.items():
            shape = (layout.n_test, k, width)
            rows = max(1, min(CHUNK_ROWS, layout.n_test, _VALUES_PER_CHUNK // (k * width)))
            name = f"contributions/{end}{suffix}"
            specs[name] = ArraySpec(name, shape, (rows, k, width), None, "float32", _NAN, ("test", "pair", dim))
    return specs


def spec_of(name: str, array: zarr.Array[Any], n_blocks: int, layout: Layout, path: Location) -> ArraySpec:
    """Return the spec of an array of contributions, going by its own k' and length.

    Raises:
        CorruptStoreError: The array has a shape that contributions cannot have.
    """
    k = int(array.shape[1]) if array.ndim == 3 else 0
    if not 1 <= k <= layout.k:
        raise CorruptStoreError(f"`{name}` of {path} must be of at most {layout.k} ranked pairs, got {array.shape}.")
    try:
        return contribution_specs(layout, k, n_blocks, array if name.endswith("_tokens") else None)[name]
    except SettingError as error:
        raise CorruptStoreError(f"`{name}` of {path} cannot be: {error}") from error
