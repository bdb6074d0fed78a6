"""The reducer on Dask: the same kernels, summed over the chunks on the workers, a tree of sums of groups.

A pass writes the broadcast tensors to files once (k·p numbers; workers read them through the page cache) and adds what
the kernel gives for each chunk as `groups` and `sums` say. Nothing but the final sum comes back. Its tasks are few,
however many chunks there are, and go the way of all others: tried again if they fail, started elsewhere if a worker
stands still.
"""

import copy
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed import Client
from torch import Tensor

from distinfluence.influence.arrays import Array, to_numpy, to_tensor
from distinfluence.model.reducer import ChunkReducer, Kernel
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.dispatch.agenda import TaskQueue
from distinfluence.scaling.dispatch.executor import OnCluster
from distinfluence.scaling.dispatch.kernel_tasks import run_kernel
from distinfluence.scaling.dispatch.tree_sum import Tree
from distinfluence.scaling.plan.tree_shape import groups
from distinfluence.scaling.scratch import save_whole
from distinfluence.scaling.worker.context import WorkerContext


class DaskReducer(ChunkReducer):
    """Sums over chunks on the workers of a cluster.

    Args:
        risk: The caller's risk, for its dtype and device; the workers build their own from `context`.
        client: A client of the cluster.
        context: Where tasks get the model from.
        data: The data in chunks.
        remarks: How the loss was understood.
        folder: A folder that every worker sees, for the tensors of a pass.
        resources: Resources that a worker must have; none by default.
    """

    def __init__(
        self,
        risk: SampleRisk,
        client: Client,
        context: WorkerContext,
        data: ChunkedData,
        remarks: tuple[str, ...],
        folder: Path,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        self.risk = risk
        self.n_samples = data.n_samples
        self.chunk_sizes = tuple(data.sizes)
        self.remarks = remarks
        self.executor = OnCluster(client, resources=resources)
        self._context = context
        self.data = data
        self._folder = folder
        self._groups = groups(len(data.sizes))
        self._homes: dict[int, str] = {}

    def sum(self, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Σ over chunks; one task for each group of chunks and a tree of additions."""
        self._begin_pass()
        sizes = [sum(self.chunk_sizes[i] for i in group) for group in self._groups]
        tree = Tree([(self._chunks(group),) for group in self._groups], self._homes, sizes, self._did)
        with self._broadcast(kernel, broadcast) as files:
            ((_, total),) = self.executor.follow(tree, (self._context, kernel, files))
        self._homes = tree.homes
        return self._here(total)

    def map(self, kernel: Kernel, *broadcast: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Return the chunks' results one by one, in the order of the chunks."""
        self._begin_pass()
        items = [(self._chunks(range(index, index + 1)),) for index in range(len(self.chunk_sizes))]
        early: dict[int, Any] = {}
        with self._broadcast(kernel, broadcast) as files:
            index = 0
            for position, result in self.executor.run(run_kernel, (self._context, kernel, files), items):
                early[position] = result
                while index in early:
                    yield self._here(early.pop(index))
                    index += 1

    def one(self, index: int, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """One task, on the worker that has the chunk in passes."""
        home = self._homes.get(next(i for i, group in enumerate(self._groups) if index in group))
        with self._broadcast(kernel, broadcast) as files:
            item = (self._context, kernel, files, self._chunks(range(index, index + 1)))
            ((_, result),) = self.executor.follow(TaskQueue(run_kernel, [item], [home] if home else None))
        return self._here(result)

    def to(self, risk: SampleRisk) -> "DaskReducer":
        """Return the same chunks; the workers' device is fixed by their context."""
        other = copy.copy(self)
        other.risk = risk
        return other

    def _chunks(self, group: range) -> tuple[object, ...]:
        data = self.data
        return tuple((data.sources[i], i, data.starts[i], data.sizes[i]) for i in group)

    def _here(self, arrays: tuple[Array, ...]) -> tuple[Tensor, ...]:
        return tuple(to_tensor(array).to(self.risk.device) for array in arrays)

    @contextmanager
    def _broadcast(self, kernel: Kernel, tensors: tuple[Tensor, ...]) -> Iterator[tuple[str, ...]]:
        """Files of the tensors that every chunk gets, for the time of a pass."""
        name = f"{type(kernel).__name__}-{uuid.uuid4().hex[:8]}"
        files = [self._folder / f"{name}-{i}.npy" for i in range(len(tensors))]
        try:
            for file, tensor in zip(files, tensors, strict=True):
                save_whole(file, to_numpy(tensor))
            yield tuple(map(str, files))
        finally:
            for file in files:
                file.unlink(missing_ok=True)
