"""Where tasks run: the model that is built once per process, and the chunks that a process keeps.

Every task gets a `Context`, from which the fitted influence model is built on first use and kept. One torch task runs
at a time in a process (threads that share a module give wrong numbers, silently), with as many threads as its share of
the host. Arguments and results are NumPy arrays and small values.
"""

import copy
import fcntl
import shutil
import socket
import tempfile
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol, TypeAlias

import cloudpickle
import dask
import numpy as np
import torch
from distributed import get_worker
from torch import nn

from distinfluence.errors import ClusterError, DistinfluenceError, NonDeterministicDataError, SampleError, StoreError
from distinfluence.influence.arrays import (
    ArrayBatch,
    named_arrays,
    to_numpy,
    to_tensor,
    to_tensor_batch,
)
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.report import FitReport
from distinfluence.model.batch import Batch
from distinfluence.model.reducer import OTHER_VALUES, LoopPlane
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.data.recipe import ModelRecipe
from distinfluence.scaling.data.sources import ChunkSource
from distinfluence.scaling.plan.problem import kept_bytes
from distinfluence.scaling.scratch import save_whole
from distinfluence.scaling.worker.device import task_device
from distinfluence.solvers.auto import free_bytes
from distinfluence.store.format.fingerprint import fingerprint_arrays

Chunk: TypeAlias = "ChunkSource | ArrayBatch"


_HOST = socket.gethostname().encode()
RUN_PREFIX = "run-"  # of the folders of single runs in a scratch folder

_one_at_a_time = threading.RLock()


class Context(Protocol):
    """Where a task gets its influence model from."""

    @property
    def key(self) -> str:
        """The same for the same fitted model."""

    def influence(self) -> InfluenceFunctionModel:
        """The influence model, built once in this process."""


@dataclass(frozen=True, eq=False)
class LocalContext:
    """The caller's own influence model, for tasks that run in the caller's process.

    travel: makes what goes in its place where tasks are sent away after all: a client that is active in this process
    takes every `compute()` of a dask array to its cluster.
    """

    key: str
    model: InfluenceFunctionModel
    travel: "Callable[[], WorkerContext] | None" = None

    def influence(self) -> InfluenceFunctionModel:
        """The model itself."""
        return self.model

    def __reduce__(self) -> "tuple[Callable[[WorkerContext], WorkerContext], tuple[WorkerContext]]":
        if self.travel is None:
            raise ClusterError("this influence model works in this process only. Use a `DaskInfluenceCalculator`.")
        return _arrived, (self.travel(),)


def _arrived(context: "WorkerContext") -> "WorkerContext":
    return context


class Scratch:
    """Folders for a run's files. kept: the one that was named, for what a later run may take; folder: for the rest.

    `folder` goes, whole, when nothing on this side refers to it: a folder of its own in the named one, or a temporary
    one, which is `kept`, too, if none was named. Contexts hold on to it, so that lazy arrays outlive the calculator
    that made them. It does not travel. Those of runs of this host that were killed go when its next run comes: their
    lock is free. Of another host's that cannot be known, as some shared file systems keep locks to the host.
    """

    def __init__(self, named: str | Path | None) -> None:
        self.temporary = named is None
        if named is not None:
            self.kept = Path(named).expanduser().resolve()
            try:
                self.kept.mkdir(parents=True, exist_ok=True)
                _remove_left(self.kept)
                self.folder = Path(tempfile.mkdtemp(prefix=RUN_PREFIX, dir=self.kept))
                self.folder.chmod(self.kept.stat().st_mode & 0o777)  # workers may be another user's
            except OSError as error:
                raise StoreError(
                    f"`scratch` {self.kept} cannot be made: {error.strerror}. Pass a folder that can, or an output "
                    "beside which it can."
                ) from error
        else:
            self.folder = self.kept = Path(
                tempfile.mkdtemp(prefix="distinfluence-", dir=dask.config.get("temporary-directory", None))
            )
        weakref.finalize(self, _removed, self.folder, _held(self.folder))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _held(folder: Path) -> IO[bytes]:
    """The lock of a run's folder, which the system releases when its holder dies. It names the host once it holds."""
    lock = (folder / "lock").open("wb", buffering=0)
    with suppress(OSError):  # a file system without locks: what is left there stays until somebody removes it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.write(_HOST)
    return lock


def _removed(folder: Path, lock: IO[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _remove_left(scratch: Path) -> None:
    """Remove the folders of this host's runs whose process is gone."""
    for folder in scratch.glob(f"{RUN_PREFIX}*"):
        with suppress(OSError), (folder / "lock").open("rb+") as lock:  # none yet: it is just being made
            if lock.read() == _HOST:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class WorkerContext:
    """A model as a recipe, with the settings, the fitted state's files and the training set's chunks.

    scratch: where its files are, None once it has travelled. unbound: the pickled influence model without its module.
    state: array name → .npy file. n_threads: of torch, in a task. device: "auto", "cpu" or "cuda", see `task_device`:
    what it comes to, and which GPU that is, is decided where the task runs.
    """

    key: str
    scratch: Scratch | None
    unbound: bytes
    recipe: ModelRecipe
    device: str
    n_threads: int
    state: Mapping[str, str]
    report: FitReport | None
    train: ChunkedData | None

    def influence(self) -> InfluenceFunctionModel:
        """Build, restore, and keep for the next task; the oldest of several is dropped."""
        if self.key not in _models:
            module = _module(self.recipe)
            model = cloudpickle.loads(self.unbound).bound_to(module, task_device(self.device))
            if self.report is not None and self.train is not None:
                plane = SourcePlane(model.risk, self.train)
                arrays = {name: to_tensor(np.load(path, mmap_mode="c")) for name, path in self.state.items()}
                model.restore(plane, {n: a.to(model.risk.device) for n, a in arrays.items()}, self.report)
            _models[self.key] = model
            while len(_models) > 2:
                _models.popitem(last=False)
        return _models[self.key]


def travelling(
    model: InfluenceFunctionModel,
    recipe: ModelRecipe,
    scratch: Scratch,
    n_threads: int,
    device: str | None = None,
) -> WorkerContext:
    """An influence model that is not fitted, for tasks in other processes; device: the caller's own unless given."""
    return WorkerContext(
        key=uuid.uuid4().hex,
        scratch=scratch,
        unbound=bytes(cloudpickle.dumps(model.unbound())),
        recipe=recipe,
        device=device or model.risk.device.type,
        n_threads=n_threads,
        state={},
        report=None,
        train=None,
    )


def fitted_travelling(
    context: WorkerContext, model: InfluenceFunctionModel, scratch: Scratch, train: ChunkedData
) -> WorkerContext:
    """The same with the fitted state, written to files in the scratch folder."""
    key = uuid.uuid4().hex
    files = {}
    for number, (name, tensor) in enumerate(model.state_arrays().items()):
        path = scratch.folder / f"state-{key[:8]}-{number}.npy"
        save_whole(path, to_numpy(tensor))
        files[name] = str(path)
    return replace(context, key=key, state=files, report=model.fit_report, train=train)


_models: OrderedDict[str, InfluenceFunctionModel] = OrderedDict()
_modules: OrderedDict[bytes, nn.Module] = OrderedDict()


def _module(recipe: ModelRecipe) -> nn.Module:
    """The module of a recipe, built once; fitted and unfitted influence models share it, since they only read it.

    The key is the whole recipe: models with equal tensors may differ in what their forward does with them.
    """
    key: bytes = cloudpickle.dumps(recipe)
    if key not in _modules:
        _modules[key] = recipe.build()
        while len(_modules) > 2:
            _modules.popitem(last=False)
    return _modules[key]


@contextmanager
def torch_task(context: Context) -> Iterator[InfluenceFunctionModel]:
    """The influence model, for this task alone, with the threads that the context grants."""
    n_threads = getattr(context, "n_threads", None)
    with _one_at_a_time:
        before = torch.get_num_threads()
        if n_threads is not None and n_threads != before:
            torch.set_num_threads(n_threads)
        try:
            yield context.influence()
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)


class SourcePlane(LoopPlane):
    """Chunks that this process loads for itself, one after the other, keeping what fits."""

    def __init__(self, risk: SampleRisk, data: ChunkedData, remarks: tuple[str, ...] = ()) -> None:
        super().__init__(risk)
        self._data = data
        self.n_samples = data.n_samples
        self.chunk_sizes = tuple(data.sizes)
        self.remarks = remarks
        self._checked = False

    def batches(self) -> Iterator[Batch]:
        """All chunks, placed on the risk's device; the model is checked on the first."""
        for index in range(len(self._data.sizes)):
            yield self.batch(index)

    def batch(self, index: int) -> Batch:
        """One chunk, placed on the risk's device."""
        with named_samples(index, self._data.starts[index], self._data.sizes[index]):
            batch = self.risk.place(to_tensor_batch(load(self._data.sources[index])))
            if not self._checked:
                self.remarks = self.risk.check(batch)
                self._checked = True
        return batch

    def to(self, risk: SampleRisk) -> "SourcePlane":
        """The same chunks for a risk on another device."""
        other = copy.copy(self)
        other.risk = risk
        return other


def samples_of(index: int, start: int, size: int) -> str:
    """How errors name a chunk."""
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
    """The tensors that all chunks of a pass get: read, and put on the device, once in a process.

    files: .npy files, of other names in each pass. Those of the pass before are dropped. To be called within a
    `torch_task`, and only read.
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
    """The chunk's arrays; those of a `ChunkSource` are kept for the next task, the oldest dropped beyond a limit."""
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
    """Bytes that this process may take: its limit as a Dask worker, else what is free here."""
    try:
        limit = get_worker().memory_manager.memory_limit
    except ValueError:  # no worker
        limit = None
    return int(limit or free_bytes(torch.device("cpu")))
