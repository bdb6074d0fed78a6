"""The tasks: work on one chunk, with NumPy arrays and small values as arguments and results."""

import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distinfluence.curvature import operator_class
from distinfluence.errors import DistinfluenceError
from distinfluence.influence.arrays import (
    Array,
    ArrayBatch,
    HostCopies,
    named_arrays,
    to_numpy,
    to_tensor,
    to_tensor_batch,
)
from distinfluence.influence.report import SolveReport
from distinfluence.influence.scores import InfluenceMode
from distinfluence.model.batch import batch_length, take
from distinfluence.model.identity.draw import Draw
from distinfluence.model.identity.probe import Checked
from distinfluence.model.reducer import Kernel, LocalPlane, add
from distinfluence.model.risk import EmpiricalRisk
from distinfluence.scaling.data.chunks import taken
from distinfluence.scaling.data.sources import ChunkSource, built_bytes
from distinfluence.scaling.plan.problem import Rates
from distinfluence.scaling.scratch import appearing, save_whole, scratch_errors
from distinfluence.scaling.worker.context import (
    Chunk,
    Context,
    broadcast_tensors,
    forget_broadcasts,
    load,
    named_samples,
    torch_task,
)
from distinfluence.scaling.worker.logs import logged_task
from distinfluence.store import InfluenceWriter, Layout
from distinfluence.store.format.fingerprint import fingerprint_arrays
from distinfluence.store.format.layout import FLOAT32_BITS

RATE_SAMPLES, RATE_ROWS = 32, 8  # of a calibration


@dataclass(frozen=True)
class Inspection:
    """What is known of a chunk before any computation. sha256: of its arrays. draw: which samples may be drawn."""

    sha256: str
    draw: Draw


def inspect_chunk(context: Context, chunk: Chunk, index: int, start: int, size: int) -> Inspection:
    """Load a chunk and check it: lengths, NaN and infinity."""
    with logged_task("look", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        arrays = load(chunk)
        batch = model.risk.place(to_tensor_batch(arrays))
        return Inspection(fingerprint_arrays(named_arrays(arrays)), Draw.of(batch, index))


def read_again(chunk: Chunk, index: Sequence[int]) -> ArrayBatch:
    """Some samples of a chunk, read anew: not those that this process may have kept."""
    return taken(chunk.load() if isinstance(chunk, ChunkSource) else chunk, np.asarray(index))


def check_drawn(context: Context, samples: Sequence[ArrayBatch]) -> Checked:
    """Check the model's derivatives at samples that were drawn from all over the data."""
    with torch_task(context) as model:
        batches = [model.risk.place(to_tensor_batch(own)) for own in samples]
        remarks = tuple(dict.fromkeys(remark for batch in batches for remark in model.risk.check(batch)))
        checked = model.check(batches)
        return replace(checked, remarks=tuple(dict.fromkeys((*remarks, *checked.remarks))))


@dataclass(frozen=True)
class Sample:
    """What is known of samples before anything is computed.

    remarks: how the loss was understood. input_shape: of one floating-point input, or None. nbytes: of one sample.
    built: bytes that the process took to build the data set.
    """

    remarks: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    nbytes: int
    built: int


def check_model(context: Context, chunk: Chunk) -> Sample:
    """Evaluate the model on a few samples."""
    with torch_task(context) as model:
        arrays = load(chunk)
        batch = model.risk.place(to_tensor_batch(arrays))
        remarks = model.risk.check(batch)
        built = built_bytes(chunk) if isinstance(chunk, ChunkSource) else 0
        nbytes = sum(array.nbytes for array in named_arrays(arrays).values()) // max(1, batch_length(batch))
        try:
            inputs = model.risk.objective.inputs(batch)
        except DistinfluenceError:
            return Sample(remarks, None, nbytes, built)
        shape = tuple(inputs.shape[1:]) if inputs.is_floating_point() else None
        return Sample(remarks, shape, nbytes, built)


def measure_rates(context: Context, chunk: Chunk) -> Rates:
    """Time gradients, products and a GEMM on a few samples; each once to warm up, once for the figure."""
    with torch_task(context) as model:
        batch = model.place(to_tensor_batch(load(chunk)))
        batch = take(batch, 0, min(batch_length(batch), RATE_SAMPLES))
        n, risk = batch_length(batch), model.risk
        rows = torch.ones(min(RATE_ROWS, risk.size), risk.size, dtype=risk.dtype, device=risk.device)
        operator = operator_class(model.second_order_mode)(EmpiricalRisk.over(LocalPlane(risk, [batch])))
        gradients = model.loss_gradients(batch).rows
        gradient_seconds = _seconds(lambda: model.loss_gradients(batch).rows)
        product_seconds = _seconds(lambda: operator.matmat(rows))
        gemm_seconds = _seconds(lambda: rows @ gradients.T)
        return Rates(
            gradients=n / gradient_seconds,
            products=n * len(rows) / product_seconds,
            flops=2.0 * n * len(rows) * risk.size / gemm_seconds,
        )


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    call()
    start = time.perf_counter()
    float(call().reshape(-1)[-1])  # waits for a GPU
    return max(time.perf_counter() - start, 1e-7)


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
    """Factors of a test chunk, solved in this process and written to their rows of a file; what the result keeps."""
    made = saved_fields(file, start)
    if made is not None:  # the worker that made them died before its answer was fetched
        return made
    with logged_task("solve", chunk=index), torch_task(context) as model, named_samples(index, start, size):
        gradients = model.measurement_gradients(model.place(to_tensor_batch(load(chunk))))
        factors, report = model.solve(gradients.rows)
        fields = factor_fields(factors, report, to_numpy(gradients.values), to_numpy(gradients.norms))
        save_factors(file, start, to_numpy(factors), fields)
        return fields


def chunk_right_hand_sides(context: Context, chunk: Chunk, index: int, start: int, size: int) -> dict[str, Array]:
    """Measurement gradients [n, p] of a test chunk with the measurements, for a solve elsewhere."""
    with logged_task("right-hand sides", chunk=index), torch_task(context) as model, named_samples(index, start, size):
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
        "factor_norm": np.asarray(torch.linalg.vector_norm(factors, dim=1, dtype=torch.float64).cpu()),
        "loss": losses,
        "gradient_norm": norms,
        "relative_residual": report.relative_residual.numpy(),
        "iterations": report.iterations.numpy(),
        "converged": report.converged.numpy(),
        "error_bound": bound,
    }


FIELDS = {"loss": "f8", "gradient_norm": "f8", "relative_residual": "f8", "iterations": "i8", "converged": "?"}
FIELDS |= {"error_bound": "f8", "factor_norm": "f8"}


def stored_fields(fields: Mapping[str, Array], layout: Layout) -> dict[str, Array]:
    """What goes into the result: its error bounds hold for values that are rounded, too."""
    kept = {name: values for name, values in fields.items() if name != "factor_norm"}
    if layout.mantissa_bits < FLOAT32_BITS:
        bound, norm = (np.asarray(fields[name], dtype=np.float64) for name in ("error_bound", "factor_norm"))
        kept["error_bound"] = bound + layout.rounding_error * norm
    return kept


def make_factor_file(file: Path, n_test: int, p: int, dtype: np.dtype[Any]) -> None:
    """An empty file for the factors [n_test, p] of all test points, unless a whole one is there. Raises StoreError."""
    there = _factor_rows(str(file))
    if there is None or there.shape != (n_test, p) or there.dtype != dtype:
        with scratch_errors(file.parent, file.name), appearing(file) as partial:
            np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=(n_test, p))


def _factor_rows(file: str) -> "np.memmap[Any, Any] | None":
    """The factors, mapped to be read; None where there is no such file, or a torn one."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if isinstance(found, np.memmap) else None


def save_factors(file: str, start: int, factors: Array, fields: Mapping[str, Array]) -> None:
    """Write the factors' rows from `start`, then the fields in a file of their own, which says that both are there.

    It has checksums of each row, and of each point's fields. Raises StoreError.
    """
    with scratch_errors(Path(file).parent, f"{factors.nbytes / 2**20:.0f} MiB of factors"):
        offset = np.load(file, mmap_mode="r", allow_pickle=False).offset
        with open(file, "r+b", buffering=0) as rows:  # not through the map: a full disk would be a SIGBUS there
            rows.seek(offset + start * factors[0].nbytes)
            left = memoryview(np.ascontiguousarray(factors).reshape(-1).view(np.uint8).data)
            while left:
                left = left[rows.write(left) or 0 :]
            os.fsync(rows.fileno())
    known = [np.asarray(fields[name], dtype=np.float64) for name in FIELDS]
    stored = np.stack([*known, _checksums(factors)])
    save_whole(fields_file(file, start), np.vstack([stored, _checksums(stored.T)]), sync=True)


def saved_fields(file: str, start: int, check: bool = True) -> dict[str, Array] | None:
    """The fields that `save_factors` wrote beside the rows from `start`; None if they are not as they were written.

    check: read the rows, too, and give None if these are not.
    """
    try:
        stored = np.load(fields_file(file, start), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if stored.ndim != 2 or len(stored) != len(FIELDS) + 2 or (_checksums(stored[:-1].T) != stored[-1]).any():
        return None
    if check:
        rows = _factor_rows(file)
        if rows is None or (_checksums(rows[start : start + stored.shape[1]]) != stored[-2]).any():
            return None
    return {name: values.astype(kind) for (name, kind), values in zip(FIELDS.items(), stored[:-2], strict=True)}


def _checksums(rows: Array) -> NDArray[np.float64]:
    """crc32 of each row [n, …]; exact as float64, in which fields are stored."""
    return np.array([zlib.crc32(np.ascontiguousarray(row).view(np.uint8).data) for row in rows], dtype=np.float64)


def fields_file(file: str, start: int) -> Path:
    """Where the fields of the test points from `start` are, if their factors have been made."""
    return Path(file).with_name(f"fields-{start:09d}.npy")


def influences_of_chunk(context: Context, factors: Array, chunk: Chunk, mode: str) -> NDArray[np.generic]:
    """Influences [n_test, n, ...] of a training chunk from the factors of all test points."""
    with torch_task(context) as model:
        tensor = to_tensor(factors).to(model.risk.device)
        batch = model.place(to_tensor_batch(load(chunk)))
        return to_numpy(model.tile(tensor, batch, InfluenceMode(mode)).values)


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
