"""The strips: gradients of each training chunk, times the factors of all test points, written shard by shard."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from distinfluence.errors import ChunkFailedError
from distinfluence.influence.arrays import HostCopies, to_numpy, to_tensor, to_tensor_batch
from distinfluence.influence.scores import InfluenceMode
from distinfluence.scaling.dispatch.agenda import Failures
from distinfluence.scaling.stages.inspect import listed, reasons_of
from distinfluence.scaling.stages.request import Run
from distinfluence.scaling.worker.cache import Chunk, forget_broadcasts, load, named_samples
from distinfluence.scaling.worker.context import Context, torch_task
from distinfluence.scaling.worker.logs import logged_task
from distinfluence.store import InfluenceWriter


def write_strips(run: Run) -> None:
    """Write the strips that are left to this run, one task for each.

    Raises:
        ChunkFailedError: Strips failed; they are marked and tried again on resume. All other strips are written first.
    """
    columns, pending, failures = run.request.columns, run.pending, Failures()
    panels = Panels(run.factors, run.request.plan.chunks.panel)
    items = [(columns.chunks[i], i, columns.starts[i], columns.sizes[i]) for i in pending]
    shared = (run.fitted.context, run.writer, panels, str(run.request.options.mode))
    with run.progress.stage("strips", len(pending), "strips") as bar:
        for _ in run.fitted.executor.run(write_strip, shared, items, failures):
            bar.advance()
    if failures:
        reasons = reasons_of(columns, {pending[position]: error for position, error in failures.items()})
        raise _quarantined(run.writer, reasons)


def _quarantined(writer: InfluenceWriter, reasons: Mapping[int, str]) -> ChunkFailedError:
    """Return what to raise when all other strips are written; a resumed run tries the marked ones again."""
    writer.quarantine(reasons)
    return ChunkFailedError(
        f"{len(reasons)} of {writer.layout.n_strips} strips failed every time they were tried and were quarantined, "
        f"all others are written:\n  {listed(reasons.values())}\n"
        "Mend these training samples or their loading, then go on with resume."
    )


@dataclass(frozen=True)
class Panels:
    """The factors of all test points in a file.

    Attributes:
        file: The file.
        size: How many rows of the file are in memory at a time.
    """

    file: str
    size: int

    def resident(self, device: torch.device) -> Iterator[torch.Tensor]:
        """Factors [at most size, p]: a single panel is kept for the next task, several are mapped one by one."""
        state = os.stat(self.file)  # damaged factors are made again under the same name, while this process may live on
        key = f"{self.file}, {state.st_ino}, {state.st_size} bytes, {state.st_mtime_ns}, on {device}"
        if key not in _factors:
            _factors.clear()
            forget_broadcasts()
            mapped = np.load(self.file, mmap_mode="c", allow_pickle=False)
            if self.size < len(mapped):
                for start in range(0, len(mapped), self.size):
                    # mapped anew each time: pages of the panel before would stay in this process
                    own = np.load(self.file, mmap_mode="c", allow_pickle=False)[start : start + self.size]
                    yield to_tensor(own).to(device)
                return
            _factors[key] = to_tensor(mapped).to(device)
        yield _factors[key]


_factors: dict[str, torch.Tensor] = {}


def write_strip(
    context: Context,
    writer: InfluenceWriter,
    panels: Panels,
    mode: str,
    chunk: Chunk,
    index: int,
    start: int,
    size: int,
) -> int:
    """One strip: the gradients of its training points, times the factors of all test points, to its shard.

    One gradient pass for each panel.
    """
    if writer.is_done(index):  # the worker that made it died before its answer was fetched
        return index
    with logged_task("strip", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        batch = model.place(to_tensor_batch(load(chunk)))
        copies = HostCopies()
        for factors in panels.resident(model.risk.device):
            tile = model.tile(factors, batch, InfluenceMode(mode))
            copies.add(tile.values)
        tiles = copies.arrays()
        values = tiles[0] if len(tiles) == 1 else np.concatenate(tiles)
        losses, norms = to_numpy(tile.losses), to_numpy(tile.gradient_norms)
    with logged_task("write", chunk=index, bytes=values.nbytes):
        writer.write_strip(index, values, loss=losses, gradient_norm=norms)
    return index
