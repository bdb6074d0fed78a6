"""What runs inside a task: the model that is built once per process, and the work on one chunk.

Every task gets a `Context`, from which the fitted influence model is built on first use and kept. One torch task runs
at a time in a process (threads that share a module give wrong numbers, silently), with as many threads as its share of
the host. Arguments and results are NumPy arrays and small values.
"""

import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import cloudpickle
import dask
import numpy as np
import torch
from numpy.typing import NDArray

from distinfluence.batch import Batch, batch_length
from distinfluence.dataplane import Kernel, LoopPlane
from distinfluence.errors import DistinfluenceError
from distinfluence.influence.arrays import (
    Array,
    ArrayBatch,
    named_arrays,
    to_numpy,
    to_tensor,
    to_tensor_batch,
)
from distinfluence.influence.base import InfluenceFunctionModel, InfluenceMode
from distinfluence.influence.report import FitReport, SolveReport
from distinfluence.sample_risk import SampleRisk
from distinfluence.scaling.chunks import ChunkedData, ChunkSource
from distinfluence.scaling.recipe import ModelRecipe
from distinfluence.store import InfluenceWriter
from distinfluence.store.fingerprint import fingerprint_arrays

KEPT_CHUNK_BYTES = 2**30  # of loaded chunks that a process keeps between tasks

Chunk: TypeAlias = "ChunkSource | ArrayBatch"

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
    """The caller's own influence model, for tasks that run in the caller's process."""

    key: str
    model: InfluenceFunctionModel

    def influence(self) -> InfluenceFunctionModel:
        """The model itself."""
        return self.model


class Scratch:
    """A folder for files that only live during a run; a temporary one goes when nothing on this side refers to it.

    Contexts hold on to it, so that lazy arrays outlive the calculator that made them. It does not travel.
    """

    def __init__(self, folder: str | Path | None) -> None:
        if folder is not None:
            self.folder = Path(folder).expanduser().resolve()
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            self.folder = Path(
                tempfile.mkdtemp(prefix="distinfluence-", dir=dask.config.get("temporary-directory", None))
            )
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


@dataclass(frozen=True)
class WorkerContext:
    """A model as a recipe, with the settings, the fitted state's files and the training set's chunks.

    scratch: where its files are, None once it has travelled. unbound: the pickled influence model without its module.
    state: array name → .npy file. n_threads: of torch, in a task. device: "cpu" or "cuda"; which GPU is decided where
    the task runs.
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
            model = cloudpickle.loads(self.unbound).bound_to(self.recipe.build(), torch.device(self.device))
            if self.report is not None and self.train is not None:
                plane = SourcePlane(model.risk, self.train)
                arrays = {name: to_tensor(np.load(path, mmap_mode="c")) for name, path in self.state.items()}
                model.restore(plane, {n: a.to(model.risk.device) for n, a in arrays.items()}, self.report)
            _models[self.key] = model
            while len(_models) > 2:
                _models.popitem(last=False)
        return _models[self.key]


_models: OrderedDict[str, InfluenceFunctionModel] = OrderedDict()


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
        self.remarks = remarks
        self._checked = False

    def batches(self) -> Iterator[Batch]:
        """All chunks, placed on the risk's device; the model is checked on the first."""
        for index, (start, source) in enumerate(zip(self._data.starts, self._data.sources, strict=True)):
            with named_samples(index, start, self._data.sizes[index]):
                batch = self.risk.place(to_tensor_batch(load(source)))
                if not self._checked:
                    self.remarks = self.risk.check(batch)
                    self._checked = True
            yield batch

    def to(self, risk: SampleRisk) -> "SourcePlane":
        """The same chunks for a risk on another device."""
        return SourcePlane(risk, self._data, self.remarks)


@contextmanager
def named_samples(index: int, start: int, size: int) -> Iterator[None]:
    """Let errors about a chunk say which samples of the data set they mean."""
    try:
        yield
    except DistinfluenceError as error:
        raise type(error)(f"chunk {index} (samples {start} to {start + size - 1}): {error}") from error


_chunks: OrderedDict[str, ArrayBatch] = OrderedDict()
_chunk_bytes: dict[str, int] = {}


def load(chunk: Chunk) -> ArrayBatch:
    """The chunk's arrays; those of a `ChunkSource` are kept for the next task, the oldest dropped beyond a limit."""
    if not isinstance(chunk, ChunkSource):
        return chunk
    if chunk.key not in _chunks:
        _chunks[chunk.key] = chunk.load()
        _chunk_bytes[chunk.key] = sum(array.nbytes for array in named_arrays(_chunks[chunk.key]).values())
        while sum(_chunk_bytes.values()) > KEPT_CHUNK_BYTES and len(_chunks) > 1:
            oldest, _ = _chunks.popitem(last=False)
            del _chunk_bytes[oldest]
    return _chunks[chunk.key]


@dataclass(frozen=True)
class Inspection:
    """What is known of a chunk before any computation. sha256: of its arrays. n: its samples."""

    sha256: str
    n: int


def inspect_chunk(context: Context, chunk: Chunk, index: int, start: int, size: int) -> Inspection:
    """Load a chunk and check it: lengths, NaN and infinity."""
    with torch_task(context) as model, named_samples(index, start, size):
        arrays = load(chunk)
        n = batch_length(model.risk.place(to_tensor_batch(arrays)))
        return Inspection(fingerprint_arrays(named_arrays(arrays)), n)


def check_model(context: Context, chunk: Chunk) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Evaluate the model on a few samples; remarks on the loss, and the shape of one floating-point input or None."""
    with torch_task(context) as model:
        batch = model.risk.place(to_tensor_batch(load(chunk)))
        remarks = model.risk.check(batch)
        try:
            inputs = model.risk.objective.inputs(batch)
        except DistinfluenceError:
            return remarks, None
        return remarks, tuple(inputs.shape[1:]) if inputs.is_floating_point() else None


def store_chunk(chunk: Chunk, folder: str, name: str) -> ArrayBatch:
    """Write a chunk's arrays to .npy files in a folder, whole or not at all; the files' names in the batch's form."""
    return _stored(load(chunk), Path(folder), name)


def _stored(arrays: ArrayBatch, folder: Path, name: str) -> ArrayBatch:
    if isinstance(arrays, dict):
        return {key: _stored(value, folder, f"{name}-{i}") for i, (key, value) in enumerate(arrays.items())}
    if isinstance(arrays, tuple):
        return tuple(_stored(value, folder, f"{name}-{i}") for i, value in enumerate(arrays))
    path = folder / f"{name}.npy"
    save_whole(path, np.asarray(arrays))
    return np.array([str(path), *map(str, np.asarray(arrays).shape)])


def save_whole(path: Path, array: Array) -> None:
    """Write a .npy file under another name first, so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with partial.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    partial.replace(path)


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
        fields = factor_fields(report, to_numpy(gradients.values), to_numpy(gradients.norms))
        return {"factors": to_numpy(factors), **fields}


def solve_chunk(context: Context, chunk: Chunk, file: str, index: int, start: int, size: int) -> dict[str, Array]:
    """Factors of a test chunk, solved in this process and written to a file; what the result keeps of each point."""
    with torch_task(context) as model, named_samples(index, start, size):
        gradients = model.measurement_gradients(model.place(to_tensor_batch(load(chunk))))
        factors, report = model.solve(gradients.rows)
        fields = factor_fields(report, to_numpy(gradients.values), to_numpy(gradients.norms))
        save_factors(file, to_numpy(factors), fields)
        return fields


def chunk_right_hand_sides(context: Context, chunk: Chunk, index: int, start: int, size: int) -> dict[str, Array]:
    """Measurement gradients [n, p] of a test chunk with the measurements, for a solve elsewhere."""
    with torch_task(context) as model, named_samples(index, start, size):
        gradients = model.measurement_gradients(model.place(to_tensor_batch(load(chunk))))
        return {
            "rows": to_numpy(gradients.rows),
            "loss": to_numpy(gradients.values),
            "gradient_norm": to_numpy(gradients.norms),
        }


def factor_fields(report: SolveReport, losses: Array, norms: Array) -> dict[str, Array]:
    """What the result keeps of each test point, by its field names."""
    return {
        "loss": losses,
        "gradient_norm": norms,
        "relative_residual": report.relative_residual.numpy(),
        "iterations": report.iterations.numpy(),
        "converged": report.converged.numpy(),
    }


def save_factors(file: str, factors: Array, fields: Mapping[str, Array]) -> None:
    """Write the fields, then the factors, whose presence says that both are there."""
    for name, values in fields.items():
        save_whole(_field_file(file, name), values)
    save_whole(Path(file), factors)


def saved_fields(file: str) -> dict[str, Array]:
    """The fields that `save_factors` wrote beside these factors."""
    names = ("loss", "gradient_norm", "relative_residual", "iterations", "converged")
    return {name: np.load(_field_file(file, name), allow_pickle=False) for name in names}


def _field_file(file: str, name: str) -> Path:
    return Path(file).with_suffix(f".{name}.npy")


def influences_of_chunk(context: Context, factors: Array, chunk: Chunk, mode: str) -> NDArray[np.generic]:
    """Influences [n_test, n, ...] of a training chunk from the factors of all test points."""
    with torch_task(context) as model:
        tensor = to_tensor(factors).to(model.risk.device)
        batch = model.place(to_tensor_batch(load(chunk)))
        return to_numpy(model.tile(tensor, batch, InfluenceMode(mode)).values)


def write_strip(
    context: Context,
    writer: InfluenceWriter,
    factor_files: tuple[str, ...],
    mode: str,
    chunk: Chunk,
    index: int,
    start: int,
    size: int,
) -> int:
    """One strip: the gradients of its training points once, times the factors of all test points, to its shard."""
    with torch_task(context) as model, named_samples(index, start, size):
        factors = resident_factors(factor_files).to(model.risk.device)
        tile = model.tile(factors, model.place(to_tensor_batch(load(chunk))), InfluenceMode(mode))
        values = to_numpy(tile.values)
        losses, norms = to_numpy(tile.losses), to_numpy(tile.gradient_norms)
    writer.write_strip(index, values, loss=losses, gradient_norm=norms)
    return index


_factors: dict[tuple[str, ...], torch.Tensor] = {}


def resident_factors(files: tuple[str, ...]) -> torch.Tensor:
    """Factors of all test points [n_test, p], read once per process; a single file stays memory-mapped."""
    if files not in _factors:
        _factors.clear()
        parts = [to_tensor(np.load(file, mmap_mode="c", allow_pickle=False)) for file in files]
        _factors[files] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _factors[files]


def run_kernel(context: Context, kernel: Kernel, broadcast: tuple[str, ...], chunk: Chunk) -> tuple[Array, ...]:
    """A kernel on one chunk; broadcast: .npy files of the tensors that every chunk gets."""
    with torch_task(context) as model:
        tensors = [
            to_tensor(np.load(path, mmap_mode="c", allow_pickle=False)).to(model.risk.device) for path in broadcast
        ]
        batch = model.place(to_tensor_batch(load(chunk)))
        return tuple(to_numpy(part) for part in kernel(model.risk, batch, *tensors))


def add_parts(*parts: tuple[Array, ...]) -> tuple[Array, ...]:
    """Element-wise sum of kernel results, in their order."""
    total = tuple(np.array(array) for array in parts[0])
    for part in parts[1:]:
        for accumulated, array in zip(total, part, strict=True):
            np.add(accumulated, array, out=accumulated)
    return total
