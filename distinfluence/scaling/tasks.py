"""The tasks: work on one chunk, with NumPy arrays and small values as arguments and results."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from distinfluence.batch import batch_length
from distinfluence.dataplane import Kernel
from distinfluence.errors import DistinfluenceError
from distinfluence.influence.arrays import (
    Array,
    ArrayBatch,
    named_arrays,
    to_numpy,
    to_tensor,
    to_tensor_batch,
)
from distinfluence.influence.report import SolveReport
from distinfluence.influence.scores import InfluenceMode
from distinfluence.scaling.worker import Chunk, Context, load, named_samples, save_whole, torch_task
from distinfluence.store import InfluenceWriter
from distinfluence.store.fingerprint import fingerprint_arrays


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


def solve_chunk(context: Context, chunk: Chunk, file: str, index: int, start: int, size: int) -> dict[str, Array]:
    """Factors of a test chunk, solved in this process and written to a file; what the result keeps of each point."""
    with torch_task(context) as model, named_samples(index, start, size):
        gradients = model.measurement_gradients(model.place(to_tensor_batch(load(chunk))))
        factors, report = model.solve(gradients.rows)
        fields = factor_fields(factors, report, to_numpy(gradients.values), to_numpy(gradients.norms))
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


def factor_fields(factors: torch.Tensor, report: SolveReport, losses: Array, norms: Array) -> dict[str, Array]:
    """What the result keeps of each test point, by its field names; error bounds leave room for float32 storage."""
    bound = np.full(len(losses), np.nan)
    if report.error_bound is not None:
        sizes = torch.linalg.vector_norm(factors, dim=1, dtype=torch.float64).cpu()
        bound = (report.error_bound + torch.finfo(torch.float32).eps * sizes).numpy()
    return {
        "loss": losses,
        "gradient_norm": norms,
        "relative_residual": report.relative_residual.numpy(),
        "iterations": report.iterations.numpy(),
        "converged": report.converged.numpy(),
        "error_bound": bound,
    }


def save_factors(file: str, factors: Array, fields: Mapping[str, Array]) -> None:
    """Write the fields, then the factors, whose presence says that both are there."""
    for name, values in fields.items():
        save_whole(_field_file(file, name), values)
    save_whole(Path(file), factors)


def saved_fields(file: str) -> dict[str, Array]:
    """The fields that `save_factors` wrote beside these factors."""
    names = ("loss", "gradient_norm", "relative_residual", "iterations", "converged", "error_bound")
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
