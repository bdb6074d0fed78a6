"""The tasks: work on one chunk, with NumPy arrays and small values as arguments and results."""

import os
from collections.abc import Iterator

import numpy as np
import torch

from distinfluence.influence.arrays import (
    HostCopies,
    to_numpy,
    to_tensor,
    to_tensor_batch,
)
from distinfluence.influence.scores import InfluenceMode
from distinfluence.scaling.worker.cache import Chunk, forget_broadcasts, load, named_samples
from distinfluence.scaling.worker.context import Context, torch_task
from distinfluence.scaling.worker.logs import logged_task
from distinfluence.store import InfluenceWriter


def write_strip(
    context: Context,
    writer: InfluenceWriter,
    file: str,
    panel: int,
    mode: str,
    chunk: Chunk,
    index: int,
    start: int,
    size: int,
) -> int:
    """One strip: the gradients of its training points, times the factors of all test points, to its shard.

    file: of the factors; panel: how many of its rows are in memory at a time. One gradient pass for each panel.
    """
    if writer.is_done(index):  # the worker that made it died before its answer was fetched
        return index
    with logged_task("strip", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        batch = model.place(to_tensor_batch(load(chunk)))
        copies = HostCopies()
        for factors in resident_panels(file, panel, model.risk.device):
            tile = model.tile(factors, batch, InfluenceMode(mode))
            copies.add(tile.values)
        tiles = copies.arrays()
        values = tiles[0] if len(tiles) == 1 else np.concatenate(tiles)
        losses, norms = to_numpy(tile.losses), to_numpy(tile.gradient_norms)
    with logged_task("write", chunk=index, bytes=values.nbytes):
        writer.write_strip(index, values, loss=losses, gradient_norm=norms)
    return index


_factors: dict[str, torch.Tensor] = {}


def resident_panels(file: str, panel: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Panels of factors [at most panel, p]: a single one is kept for the next task, several are mapped one by one."""
    state = os.stat(file)  # damaged factors are made again under the same name, while this process may live on
    key = f"{file}, {state.st_ino}, {state.st_size} bytes, {state.st_mtime_ns}, on {device}"
    if key not in _factors:
        _factors.clear()
        forget_broadcasts()
        mapped = np.load(file, mmap_mode="c", allow_pickle=False)
        if panel < len(mapped):
            for start in range(0, len(mapped), panel):
                # mapped anew each time: pages of the panel before would stay in this process
                own = np.load(file, mmap_mode="c", allow_pickle=False)[start : start + panel]
                yield to_tensor(own).to(device)
            return
        _factors[key] = to_tensor(mapped).to(device)
    yield _factors[key]
