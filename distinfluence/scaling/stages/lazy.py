"""Lazy dask arrays of a fitted run, one block per chunk: gradients, factors and influences; and their tasks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import ShapeError
from distinfluence.influence.arrays import Array, to_numpy, to_tensor, to_tensor_batch
from distinfluence.influence.scores import InfluenceMode
from distinfluence.model.data.arrays import is_dask_array
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.stages.factor_file import factor_fields
from distinfluence.scaling.stages.request import FittedRun
from distinfluence.scaling.worker.cache import Chunk, load
from distinfluence.scaling.worker.context import Context, torch_task

REPORT = {"relative_residual": "f8", "iterations": "i8", "converged": "?", "error_bound": "f8"}


@dataclass(frozen=True)
class LazyArrays:
    """Lazy arrays of a fitted run."""

    fitted: FittedRun

    def gradients(self, data: ChunkedData) -> da.Array:
        """Per-sample gradients [n, p] of the training loss."""
        return self._joined(self._blocks(chunk_gradients, data), self._p)

    def factors(self, data: ChunkedData) -> tuple[da.Array, dict[str, da.Array]]:
        """Factors [n, p] of test points, and the fields of their report, each [n]."""
        solved = list(self._blocks(chunk_factors, data))
        report = {
            name: da.concatenate([da.from_delayed(fields[name], (n,), dtype=np.dtype(kind)) for fields, n in solved])
            for name, kind in REPORT.items()
        }
        return self._joined(((fields["factors"], n) for fields, n in solved), self._p), report

    def influences(self, factors: Any, data: ChunkedData, mode: InfluenceMode) -> da.Array:
        """Influences [n_test, n, …] from factors [n_test, p], a dask or NumPy array. Raises ShapeError."""
        if factors.ndim != 2 or (factors.shape[1],) != self._p:
            raise ShapeError(
                f"`factors` must be [n_test, {self._p[0]}], got {tuple(factors.shape)}. Pass what `influence_factors` "
                "returned."
            )
        shape = self.fitted.sample.entry_shape(mode)
        whole = factors.rechunk(-1).to_delayed()[0, 0] if is_dask_array(factors) else dask.delayed(factors)
        return self._joined(self._blocks(influences_of_chunk, data, whole, str(mode)), shape, (factors.shape[0],))

    @property
    def _p(self) -> tuple[int]:
        return (self.fitted.model.n_parameters,)

    def _blocks(self, task: Callable[..., object], data: ChunkedData, *more: object) -> Iterator[tuple[Any, int]]:
        """Return a lazy call for each chunk, and its samples."""
        context = self.fitted.context
        node = dask.delayed(context, name=f"context-{context.key}", pure=False, traverse=False)
        call = dask.delayed(task, pure=False, traverse=False)
        return ((call(node, chunk, *more), size) for chunk, size in zip(data.chunks, data.sizes, strict=True))

    def _joined(
        self, blocks: Iterator[tuple[Any, int]], after: tuple[int, ...], before: tuple[int, ...] = ()
    ) -> da.Array:
        dtype = to_numpy(next(iter(self.fitted.model.risk.parameters.values())).new_zeros(0)).dtype
        arrays = [da.from_delayed(block, (*before, n, *after), dtype=dtype) for block, n in blocks]
        joined: da.Array = da.concatenate(arrays, axis=len(before))
        return joined


def chunk_gradients(context: Context, chunk: Chunk) -> NDArray[np.generic]:
    """Per-sample gradients [n, p] of the training loss."""
    with torch_task(context) as model:
        return to_numpy(model.loss_gradients(model.place(to_tensor_batch(load(chunk)))).rows)


def chunk_factors(context: Context, chunk: Chunk) -> dict[str, Array]:
    """Factors [n, p] of a test chunk, solved in this process, with the solve's report by field."""
    with torch_task(context) as model:
        gradients = model.measurement_gradients(model.place(to_tensor_batch(load(chunk))))
        factors, report = model.solve(gradients.rows)
        fields = factor_fields(factors, report, to_numpy(gradients.values), to_numpy(gradients.norms))
        return {"factors": to_numpy(factors), **fields}


def influences_of_chunk(context: Context, chunk: Chunk, factors: Array, mode: str) -> NDArray[np.generic]:
    """Influences [n_test, n, ...] of a training chunk from the factors of all test points."""
    with torch_task(context) as model:
        tensor = to_tensor(factors).to(model.risk.device)
        batch = model.place(to_tensor_batch(load(chunk)))
        return to_numpy(model.tile(tensor, batch, InfluenceMode(mode)).values)
