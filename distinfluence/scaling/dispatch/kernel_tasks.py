"""A kernel summed over chunks on a worker, and the sum of such sums."""

from collections.abc import Sequence

import numpy as np
import torch

from distinfluence.influence.arrays import (
    Array,
    to_numpy,
    to_tensor_batch,
)
from distinfluence.model.reducer import Kernel, add
from distinfluence.scaling.worker.cache import Chunk, broadcast_tensors, load, named_samples
from distinfluence.scaling.worker.context import Context, torch_task
from distinfluence.scaling.worker.logs import logged_task


def run_kernel(
    context: Context, kernel: Kernel, broadcast: tuple[str, ...], chunks: Sequence[tuple[Chunk, int, int, int]]
) -> tuple[Array, ...]:
    """Sum of a kernel's results over chunks, one after the other.

    broadcast: .npy files of the tensors that every chunk gets. chunks: each with its index, first sample and size.
    """
    doing = {"kernel": type(kernel).__name__, "chunks": len(chunks)}
    with logged_task("pass", **doing), torch_task(context) as model:
        tensors = broadcast_tensors(broadcast, model.risk.device)
        total: tuple[torch.Tensor, ...] = ()
        for chunk, index, start, size in chunks:
            with named_samples(index, start, size):
                batch = model.place(to_tensor_batch(load(chunk)))
                total = add(total, kernel(model.risk, batch, *tensors))
        return tuple(to_numpy(part) for part in total)


def add_parts(*parts: tuple[Array, ...]) -> tuple[Array, ...]:
    """Element-wise sum of kernel results, in their order."""
    total = tuple(np.array(array) for array in parts[0])
    for part in parts[1:]:
        for accumulated, array in zip(total, part, strict=True):
            np.add(accumulated, array, out=accumulated)
    return total
