"""What a process keeps from one task to the next: chunks of data and the tensors of the pass."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from distributed import get_worker

from distinfluence.errors import DistinfluenceError, NonDeterministicDataError, SampleError
from distinfluence.influence.arrays import (
    ArrayBatch,
    named_arrays,
    to_tensor,
)
from distinfluence.memory import free_bytes
from distinfluence.model.reducer import OTHER_VALUES
from distinfluence.scaling.data.sources import ChunkSource
from distinfluence.scaling.plan.problem import kept_bytes
from distinfluence.store.format.fingerprint import fingerprint_arrays

Chunk: TypeAlias = "ChunkSource | ArrayBatch"


def samples_of(index: int, start: int, size: int) -> str:
    """Return how errors name a chunk."""
    return f"chunk {index} (samples {start} to {start + size - 1})"


@contextmanager
def named_samples(index: int, start: int, size: int) -> Iterator[None]:
    """Let errors about a chunk say which samples of the data set they mean."""
    named = samples_of(index, start, size)
    try:
        yield
    except DistinfluenceError as error:
        raise type(error)(f"{named}: {error}") from error
    except Exception as error:  # of a user's data set or model
        raise SampleError(f"{named}: {type(error).__name__}: {error}") from error


_broadcasts: dict[tuple[tuple[str, ...], torch.device], list[torch.Tensor]] = {}


def broadcast_tensors(files: tuple[str, ...], device: torch.device) -> list[torch.Tensor]:
    """Return the tensors that all chunks of a pass get: read, and put on the device, once in a process.

    Call this within a `torch_task`, and only read the tensors. The tensors of the pass before are dropped.

    Args:
        files: .npy files, with other names in each pass.
        device: The device.
    """
    key = (files, device)
    if key not in _broadcasts:
        _broadcasts.clear()
        _broadcasts[key] = [to_tensor(np.load(file, mmap_mode="c", allow_pickle=False)).to(device) for file in files]
    return _broadcasts[key]


def forget_broadcasts() -> None:
    """Give back the memory of the last pass: no other one is near."""
    _broadcasts.clear()


_chunks: OrderedDict[str, ArrayBatch] = OrderedDict()


_chunk_bytes: dict[str, int] = {}


def load(chunk: Chunk) -> ArrayBatch:
    """Return a chunk's arrays; those of a `ChunkSource` are kept for the next task, within a limit."""
    if not isinstance(chunk, ChunkSource):
        return chunk
    if chunk.key not in _chunks:
        arrays = chunk.load()
        if chunk.sha256 and fingerprint_arrays(named_arrays(arrays)) != chunk.sha256:
            raise NonDeterministicDataError(OTHER_VALUES.format(what="the data set"))
        _chunks[chunk.key] = arrays
        _chunk_bytes[chunk.key] = sum(array.nbytes for array in named_arrays(_chunks[chunk.key]).values())
        while sum(_chunk_bytes.values()) > kept_bytes(memory_limit()) and len(_chunks) > 1:
            oldest, _ = _chunks.popitem(last=False)
            del _chunk_bytes[oldest]
    return _chunks[chunk.key]


def memory_limit() -> int:
    """Return the bytes that this process may take: its limit as a Dask worker, else what is free here."""
    try:
        limit = get_worker().memory_manager.memory_limit
    except ValueError:  # no worker
        limit = None
    return int(limit or free_bytes(torch.device("cpu")))
