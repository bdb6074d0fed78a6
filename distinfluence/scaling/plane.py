"""The data plane on Dask: the same kernels, mapped over chunks on the workers, summed by a tree.

A pass writes the broadcast tensors to files once (k·p numbers; workers read them through the page cache), runs one task
per chunk on the worker that had the chunk before if it is free, and adds the results in a fixed order, FAN_IN at a
time. Nothing but the final sum comes back.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, TypeVar

from distributed import Client, Future, KilledWorker
from distributed.comm.core import CommClosedError
from torch import Tensor

from distinfluence.dataplane import DataPlane, Kernel
from distinfluence.influence.arrays import to_numpy, to_tensor
from distinfluence.sample_risk import SampleRisk
from distinfluence.scaling.chunks import ChunkedData
from distinfluence.scaling.executor import RETRIES, OnCluster, able_workers, killed, scheduler_is_gone
from distinfluence.scaling.files import save_whole
from distinfluence.scaling.tasks import add_parts, run_kernel
from distinfluence.scaling.worker import WorkerContext

FAN_IN = 8  # partial sums that one task adds

T = TypeVar("T")


class DaskPlane(DataPlane):
    """Sums over chunks on the workers of a cluster.

    risk: of the caller, for its dtype and device; the workers build their own from `context`. resources: that a worker
    must have.
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
        self._client = client
        self._context = context
        self._data = data
        self._folder = folder
        self._resources = dict(resources or {})
        self._sent: Future[Any] | None = None

    def sum(self, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """Σ over chunks; one task per chunk and a tree of additions."""
        self._begin_pass()
        return self._surviving(lambda: self._sum(kernel, broadcast))

    def _sum(self, kernel: Kernel, broadcast: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        name, files, parts = self._submit(kernel, broadcast)
        level = 0
        try:
            while len(parts) > 1:
                groups = [parts[i : i + FAN_IN] for i in range(0, len(parts), FAN_IN)]
                parts = [
                    self._client.submit(add_parts, *group, key=f"{name}-sum{level}-{i}", pure=False)
                    for i, group in enumerate(groups)
                ]
                level += 1
            return self._result(parts[0])
        except KeyboardInterrupt:
            self._client.cancel(parts, force=True)
            raise
        finally:
            _delete(files)

    def _surviving(self, call: Callable[[], T]) -> T:
        """The call's result, tried again when workers died under it more often than the scheduler forgives."""
        for _ in range(RETRIES):
            try:
                return call()
            except KilledWorker:
                self._sent = None
        try:
            return call()
        except KilledWorker as error:
            raise killed(error) from error

    def _result(self, future: "Future[Any]") -> tuple[Tensor, ...]:
        try:
            return tuple(to_tensor(array).to(self.risk.device) for array in future.result())
        except (CancelledError, CommClosedError):
            if self._client.status != "running":
                raise scheduler_is_gone() from None
            raise

    def map(self, kernel: Kernel, *broadcast: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The chunks' results one by one, in the order of the chunks."""
        self._begin_pass()
        _, files, parts = self._submit(kernel, broadcast)
        try:
            for index in range(len(parts)):
                try:
                    result = self._result(parts.pop(0))
                except KilledWorker:
                    result = self.one(index, kernel, *broadcast)
                yield result
        finally:
            _delete(files)

    def one(self, index: int, kernel: Kernel, *broadcast: Tensor) -> tuple[Tensor, ...]:
        """One task, on the worker that has the chunk if it is free."""
        return self._surviving(lambda: self._one(index, kernel, broadcast))

    def _one(self, index: int, kernel: Kernel, broadcast: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, files, (part,) = self._submit(kernel, broadcast, only=[index])
        try:
            return self._result(part)
        finally:
            _delete(files)

    def to(self, risk: SampleRisk) -> "DaskPlane":
        """The same chunks; the workers' device is fixed by their context."""
        return DaskPlane(risk, self._client, self._context, self._data, self.remarks, self._folder, self._resources)

    def _submit(
        self, kernel: Kernel, broadcast: tuple[Tensor, ...], only: Sequence[int] | None = None
    ) -> tuple[str, list[Path], "list[Future[Any]]"]:
        name = f"{type(kernel).__name__}-{uuid.uuid4().hex[:8]}"
        files = [self._folder / f"{name}-{i}.npy" for i in range(len(broadcast))]
        for file, tensor in zip(files, broadcast, strict=True):
            save_whole(file, to_numpy(tensor))
        if self._sent is None:
            self._sent = OnCluster(self._client).send(self._context, f"context-{self._context.key}")
        workers = able_workers(self._client, self._resources)
        parts = [
            self._client.submit(
                run_kernel,
                self._sent,
                kernel,
                tuple(map(str, files)),
                self._data.sources[i],
                key=f"{name}-{i}",
                pure=False,
                workers=[workers[i % len(workers)]],
                allow_other_workers=True,
                resources=self._resources or None,
            )
            for i in (range(len(self._data.sources)) if only is None else only)
        ]
        return name, files, parts


def _delete(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
