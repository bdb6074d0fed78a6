"""What the influences of the most helpful and most harmful pairs are made of: sums over layers, and over positions.

An influence is a sum over the parameters, so a sum over blocks of them, and for sequences also over the positions of
the training sample. The group `contributions` of a result holds both for the first k' of each stored ranking; entry r
of test point i belongs to the training point `top_index`[i, r] or `bottom_index`[i, r], and sums to its influence.

    top, bottom                  [n_test, k', n_blocks]
    top_tokens, bottom_tokens    [n_test, k', n_tokens], where they are known; NaN beyond a shorter sample's end

Attribute `blocks`: their names; written last, so that without it there are no contributions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from distinfluence.errors import CorruptStoreError, SettingError, ShapeError
from distinfluence.store.format.contribution_layout import ENDS, contribution_specs
from distinfluence.store.format.folder import COMPLETE, consolidate, local_path, read_attributes, surfaced_errors
from distinfluence.store.format.html import table_as_html
from distinfluence.store.format.layout import ArraySpec, Layout
from distinfluence.store.format.ranking import Ranking
from distinfluence.store.read.arrays import ResultArrays
from distinfluence.store.read.row_ranking import rank_row


class Shares(NamedTuple):
    """The contributions to the influences of one ranking. Each row sums to its influence, within rounding.

    Attributes:
        ranking: The training points [k'] and their influences.
        by_block: Contributions by block (layer), [k', n_blocks] float32.
        by_token: Contributions by position of the training sample, [k', n_tokens] float32; None where not known.
    """

    ranking: Ranking
    by_block: NDArray[np.float32]
    by_token: NDArray[np.float32] | None

    def _repr_html_(self) -> str:
        """Return the contributions of each pair as a table, for notebooks; `Contributions` names the blocks."""
        return _shares_as_html("contributions", [f"block {i}" for i in range(self.by_block.shape[1])], self)


class Contributions(NamedTuple):
    """The contributions to the influences on one test point.

    Attributes:
        blocks: Names of the blocks (layers), one for each column of `by_block`.
        helpful: Contributions of the most helpful training points.
        harmful: Contributions of the most harmful training points.
    """

    blocks: list[str]
    helpful: Shares
    harmful: Shares

    def _repr_html_(self) -> str:
        """Return both ends with the first 20 blocks as tables, for notebooks."""
        ends = {"most helpful": self.helpful, "most harmful": self.harmful}
        return "".join(_shares_as_html(name, self.blocks, shares) for name, shares in ends.items())


def write_contributions(
    path: str | os.PathLike[str],
    blocks: Sequence[str],
    top: NDArray[Any],
    bottom: NDArray[Any],
    top_tokens: NDArray[Any] | None = None,
    bottom_tokens: NDArray[Any] | None = None,
) -> None:
    """Store the contributions to the ranked influences of a result. What was stored before is replaced.

    Args:
        path: The folder of the result.
        blocks: Names of the blocks, n_blocks of them.
        top: Contributions of the most helpful training points, [n_test, k', n_blocks]. k' is at most the length of the
            stored rankings. Memory maps are read a few rows at a time.
        bottom: Contributions of the most harmful training points, [n_test, k', n_blocks].
        top_tokens: Contributions by position, [n_test, k', n_tokens]. Default: not known.
        bottom_tokens: The same for the most harmful training points. Pass both or neither.

    Raises:
        ShapeError: If an array has another shape.
        SettingError: If one of the two token arrays is missing, there are too many blocks, or the result is of mode
            `perturbation`.
        StoreNotFoundError: If there is nothing at `path`.
        ForeignStoreError: If something else than a result is at `path`.
        StoreError: If the disk is full or cannot be written.
    """
    folder = local_path(path)
    attributes = read_attributes(folder)
    layout = Layout.from_attributes(attributes["layout"])
    arrays: dict[str, NDArray[Any]] = {"top": top, "bottom": bottom}
    if top_tokens is not None or bottom_tokens is not None:
        if top_tokens is None or bottom_tokens is None:
            raise SettingError("`top_tokens` and `bottom_tokens` go together, got one of them. Pass both.")
        arrays |= {"top_tokens": top_tokens, "bottom_tokens": bottom_tokens}
    specs = contribution_specs(layout, _kept(layout, top), len(blocks), top_tokens)
    for name, values in arrays.items():
        expected = specs[f"contributions/{name}"].shape
        if values.shape != expected:
            raise ShapeError(f"`{name}` must be {expected}, got {values.shape}. Pass one row per test point.")
    with surfaced_errors("write to", folder):
        group = zarr.open_group(str(folder), mode="r+", zarr_format=3, use_consolidated=False)
        own = group.create_group("contributions", overwrite=True)
        for name, values in arrays.items():
            _store(own, specs[f"contributions/{name}"], values)
        own.attrs["blocks"] = [str(block) for block in blocks]
        if attributes["state"] == COMPLETE:
            consolidate(folder)


def read_contributions(result: ResultArrays, row: int) -> Contributions | None:
    """Read the contributions of test point `row`, 0 <= row < n_test; None if none are stored."""
    blocks = result.contribution_blocks
    if not blocks:
        return None
    shares = []
    for end in ENDS:
        by_block = result.contribution_array(end)
        tokens = result.contribution_array(f"{end}_tokens") if result.has_token_contributions else None
        k = by_block.shape[1]
        ranking = rank_row(result, end, row, k, partial=False)
        with surfaced_errors("read", result.path):
            own = np.asarray(by_block[row])
            by_token = None if tokens is None else np.asarray(tokens[row])
        if not np.isfinite(own).all():
            raise CorruptStoreError(
                f"`contributions/{end}` of test point {row} in {result.path} are missing. Compute them again: run with "
                "`contributions` and resume."
            )
        shares.append(Shares(ranking, own, by_token))
    return Contributions(blocks, *shares)


def _shares_as_html(caption: str, blocks: list[str], shares: Shares) -> str:
    by_block = {name: shares.by_block[:, i].tolist() for i, name in enumerate(blocks[:20])}
    head = {"train": shares.ranking.indices.tolist(), "influence": shares.ranking.values.tolist()}
    return table_as_html(caption, {**head, **by_block})


def _kept(layout: Layout, top: NDArray[Any]) -> int:
    k = int(top.shape[1]) if top.ndim == 3 else 0
    if not 1 <= k <= layout.k:
        raise ShapeError(
            f"`top` must be [n_test, k, n_blocks] with k from 1 to {layout.k}, got {top.shape}. No more pairs are "
            "ranked than that."
        )
    return k


def _store(group: zarr.Group, spec: ArraySpec, values: NDArray[Any]) -> None:
    array = group.create_array(
        spec.name.rpartition("/")[2],
        shape=spec.shape,
        chunks=spec.chunks,
        dtype=spec.dtype,
        fill_value=spec.fill,
        compressors=[Crc32cCodec()],
        dimension_names=spec.dims,
    )
    for start in range(0, spec.shape[0], spec.chunks[0]):
        array[start : start + spec.chunks[0]] = np.asarray(values[start : start + spec.chunks[0]], np.float32)
