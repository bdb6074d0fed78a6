"""A result as xarray sees it: a lazy Dataset, or a DataTree with samples and contributions, under named coordinates.

Arrays come as they lie on the disk: attributes that ask readers to scale or mask values are not followed, and what is
not as the layout says is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distinfluence.errors import CorruptStoreError, MissingDependencyError
from distinfluence.store.format.contribution_layout import ENDS
from distinfluence.store.format.folder import surfaced_errors
from distinfluence.store.read.arrays import ResultArrays

if TYPE_CHECKING:
    import xarray


Chunks = Mapping[str, int] | Literal["auto"] | None


def as_dataset(result: ResultArrays, chunks: Chunks) -> xarray.Dataset:
    """Return the dataset of `InfluenceResult.to_xarray`."""
    result.check_arrays()
    dataset = _opened(result, None, chunks)
    known: dict[str, Any] = {"train_self_influence": ("train", result.points("train").self_influence())}
    for axis in ("test", "train"):
        points = result.points(axis)
        known[axis] = (axis, np.arange(dataset.sizes[axis], dtype=np.int32))
        known[f"{axis}_label"] = (axis, points.labels())
        known[f"{axis}_id"] = (axis, points.ids())
    known |= _damping(result)
    return dataset.assign_coords({name: value for name, value in known.items() if value[1] is not None})


def as_datatree(result: ResultArrays, chunks: Chunks) -> xarray.DataTree:
    """Return the tree of `InfluenceResult.to_datatree`."""
    nodes = {"/": as_dataset(result, chunks)}
    for axis in ("test", "train"):
        points = result.points(axis)
        if points.names():
            points.check()
            # not `samples/test` as on the disk: a node must not be called like a coordinate of its parents
            nodes[f"/{axis}_samples"] = _opened(result, f"samples/{axis}", chunks)
    if result.contribution_blocks:
        for end in ENDS:
            for suffix in ("", "_tokens") if result.has_token_contributions else ("",):
                result.contribution_array(f"{end}{suffix}")
        own = _opened(result, "contributions", chunks)
        nodes["/contributions"] = own.assign_coords(block=("block", np.array(result.contribution_blocks, np.str_)))
    with _needed():
        import xarray

        return xarray.DataTree.from_dict(nodes)


def _opened(result: ResultArrays, group: str | None, chunks: Chunks) -> xarray.Dataset:
    cut = dict(chunks) if isinstance(chunks, Mapping) else chunks
    with _needed():
        import xarray
    try:
        with surfaced_errors("open", result.path):
            dataset: xarray.Dataset = xarray.open_zarr(
                result.store, group=group, consolidated=False, decode_cf=False, chunks=cut
            )
    except (KeyError, TypeError) as error:
        raise CorruptStoreError(
            f"`{group or '/'}` of {result.path} has arrays without names of dimensions: {error!r}. Compute it again."
        ) from error
    return dataset


def _damping(result: ResultArrays) -> dict[str, Any]:
    """Return the damping λ, one for all blocks or block by block; none where it is not recorded."""
    solver = result.provenance.get("solver")
    by_block = solver.get("hessian_regularization") if isinstance(solver, Mapping) else None
    if not isinstance(by_block, Mapping) or not all(type(value) in (int, float) for value in by_block.values()):
        return {}
    values = np.array(list(by_block.values()), np.float64)
    if np.unique(values).size == 1:
        return {"damping": ((), values[0])}
    return {"block": ("block", np.array(list(by_block), np.str_)), "damping": ("block", values)}


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            "`to_xarray` needs xarray, which is not installed. Run pip install xarray."
        ) from error
