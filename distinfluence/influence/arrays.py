"""The one boundary between torch tensors and NumPy arrays.

Only NumPy arrays cross a task boundary (serialisers untie tied weights and fail on bfloat16); tensors live inside
tasks. A NumPy batch has the form of a `Batch` with arrays in place of tensors.
"""

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distinfluence.model.batch import Batch
from distinfluence.model.data.arrays import tensor_of
from distinfluence.model.data.tree import map_leaves, named_leaves

Array: TypeAlias = NDArray[np.generic]
ArrayBatch: TypeAlias = "Array | tuple[ArrayBatch, ...] | dict[str, ArrayBatch]"


def to_numpy(tensor: Tensor) -> Array:
    """Return the tensor's values on the CPU; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach().cpu()
    array: Array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


class HostCopies:
    """Tensors on their way to the host while their device computes what comes next; waited for once, at the end."""

    def __init__(self) -> None:
        self._copies: list[Tensor] = []
        self._ways: dict[torch.device, _Way] = {}

    def add(self, tensor: Tensor) -> None:
        """Begin to copy; the tensor may be let go of."""
        if tensor.device not in self._ways:
            self._ways[tensor.device] = _SideStream(tensor.device) if tensor.device.type == "cuda" else _Way()
        self._copies.append(self._ways[tensor.device].begin(tensor.detach()))

    def arrays(self) -> list[Array]:
        """All of them, in the order in which they were added."""
        for way in self._ways.values():
            way.wait()
        return [to_numpy(copy) for copy in self._copies]


class _Way:
    """From the host to the host, which is none."""

    def begin(self, tensor: Tensor) -> Tensor:
        """Where the tensor's values will be after `wait`."""
        return tensor

    def wait(self) -> None:
        """Until all copies are there."""


class _SideStream(_Way):
    """From a GPU into pinned memory, on a stream of its own, next to the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def begin(self, tensor: Tensor) -> Tensor:
        """As soon as what is computing now has made it."""
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            pinned.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not given to others before the copy is done
        return pinned

    def wait(self) -> None:
        """For this stream alone."""
        self._stream.synchronize()


def to_tensor(array: Array) -> Tensor:
    """Return a tensor of the array's values, sharing memory where the array is writable.

    Raises:
        DtypeError: If the array holds anything but numbers.
    """
    return tensor_of(np.asarray(array))


def to_numpy_batch(batch: Batch) -> ArrayBatch:
    """Return the same batch with arrays in place of tensors."""
    arrays: ArrayBatch = map_leaves(to_numpy, batch)
    return arrays


def to_tensor_batch(batch: ArrayBatch) -> Batch:
    """Return the same batch with tensors in place of arrays."""
    tensors: Batch = map_leaves(to_tensor, batch)
    return tensors


def named_arrays(batch: ArrayBatch, name: str = "batch") -> dict[str, Array]:
    """Every array of the batch under the name by which a user would reach it."""
    return dict(named_leaves(batch, name))
