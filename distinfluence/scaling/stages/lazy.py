"""Tasks of the lazy dask arrays: gradients, factors and influences of a chunk."""

import numpy as np
from numpy.typing import NDArray

from distinfluence.influence.arrays import (
    Array,
    to_numpy,
    to_tensor,
    to_tensor_batch,
)
from distinfluence.influence.scores import InfluenceMode
from distinfluence.scaling.stages.factor_file import factor_fields
from distinfluence.scaling.worker.cache import Chunk, load
from distinfluence.scaling.worker.context import Context, torch_task


def chunk_gradients(context: Context, chunk: Chunk, of_test: bool) -> NDArray[np.generic]:
    """Per-sample gradients [n, p] of the training loss, or of the query's measurement."""
    with torch_task(context) as model:
        batch = model.place(to_tensor_batch(load(chunk)))
        gradients = model.measurement_gradients(batch) if of_test else model.loss_gradients(batch)
        return to_numpy(gradients.rows)


def chunk_factors(context: Context, chunk: Chunk) -> dict[str, Array]:
    """Factors [n, p] of a test chunk, solved in this process, with the solve's report by field."""
    with torch_task(context) as model:
        gradients = model.measurement_gradients(model.place(to_tensor_batch(load(chunk))))
        factors, report = model.solve(gradients.rows)
        fields = factor_fields(factors, report, to_numpy(gradients.values), to_numpy(gradients.norms))
        return {"factors": to_numpy(factors), **fields}


def influences_of_chunk(context: Context, factors: Array, chunk: Chunk, mode: str) -> NDArray[np.generic]:
    """Influences [n_test, n, ...] of a training chunk from the factors of all test points."""
    with torch_task(context) as model:
        tensor = to_tensor(factors).to(model.risk.device)
        batch = model.place(to_tensor_batch(load(chunk)))
        return to_numpy(model.tile(tensor, batch, InfluenceMode(mode)).values)
