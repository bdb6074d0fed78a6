"""The model is evaluated on a few samples, checked, compared and timed, before anything is computed."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from distinfluence.curvature import operator_class
from distinfluence.errors import (
    DistinfluenceError,
    FingerprintError,
    ShapeError,
)
from distinfluence.influence.arrays import (
    ArrayBatch,
    named_arrays,
    to_tensor_batch,
)
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.scores import InfluenceMode
from distinfluence.model.batch import Batch, batch_length, take
from distinfluence.model.identity.probe import Checked, Probe
from distinfluence.model.reducer import LocalReducer
from distinfluence.model.risk import EmpiricalRisk, forward_flops
from distinfluence.scaling.data.sources import ChunkSource, built_bytes
from distinfluence.scaling.plan.problem import Rates
from distinfluence.scaling.worker.cache import Chunk, load
from distinfluence.scaling.worker.context import Context, torch_task


def require_same_probe(recorded: Mapping[str, Any], here: Probe, path: object) -> None:
    """Raise FingerprintError if a result was made with a model or an objective that computes something else."""
    differences = here.differences(Probe.from_json(recorded["probe"]))
    if differences:
        raise FingerprintError(
            f"`path` {path} was made with a model or an objective that computes something else: "
            f"{'; '.join(differences)}. Take the model and the objective that it was begun with, write to another "
            "path, or pass existing='replace' to start again."
        )


RATE_SAMPLES, RATE_ROWS = 32, 8  # of a calibration at first
MOST_RATE_SAMPLES, MOST_RATE_ROWS = 256, 32  # of one that takes as many as a pass does
CLOCK = time.perf_counter  # seconds; benchmarks count the processor's instead
RATE_SECONDS = 0.5  # that a product of so many may take, and repeated calls
MOST_REPEATS = 7


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

    Attributes:
        remarks: How the loss was understood.
        input_shape: Shape of one floating-point input, or None.
        nbytes: Bytes of one sample.
        built: Bytes that the process took to build the data set.
        flops: Flops of the model's outputs for one sample; 0 if they cannot be counted.
    """

    remarks: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    nbytes: int
    built: int
    flops: float = 0.0

    def entry_shape(self, mode: InfluenceMode | str) -> tuple[int, ...]:
        """Return the shape of an entry of the matrix. Raises ShapeError where there is no input to differentiate by."""
        if mode == InfluenceMode.UP:
            return ()
        if self.input_shape is None:
            raise ShapeError(
                "`mode='perturbation'` needs a floating-point input to differentiate by, and `x` has none. For token "
                "ids, let the objective's `inputs` return the embeddings."
            )
        return self.input_shape


def check_model(context: Context, chunk: Chunk) -> Sample:
    """Evaluate the model on a few samples."""
    with torch_task(context) as model:
        arrays = load(chunk)
        batch = model.risk.place(to_tensor_batch(arrays))
        remarks = model.risk.check(batch)
        built = built_bytes(chunk) if isinstance(chunk, ChunkSource) else 0
        nbytes = sum(array.nbytes for array in named_arrays(arrays).values()) // max(1, batch_length(batch))
        flops = forward_flops(model.risk, batch)
        try:
            inputs = model.risk.objective.inputs(batch)
        except DistinfluenceError:
            return Sample(remarks, None, nbytes, built, flops)
        shape = tuple(inputs.shape[1:]) if inputs.is_floating_point() else None
        return Sample(remarks, shape, nbytes, built, flops)


def measure_rates(context: Context, chunk: Chunk, sharing: int = 1) -> Rates:
    """Time gradients, products and a GEMM: on a few samples, then on as many as a pass takes where that is quick.

    Of a large model the first look is the only one. Small ones take most of their time for calls of Python, so that few
    samples and rows say little about many. sharing: processes that this one's threads are planned for.
    """
    with torch_task(context) as model, _share_of_threads(sharing):
        whole = model.place(to_tensor_batch(load(chunk)))
        few, n_rows, risk = take(whole, 0, min(batch_length(whole), RATE_SAMPLES)), RATE_ROWS, model.risk
        products = _products(model, few, n_rows)
        fixed = _seconds(_products(model, take(whole, 0, 1), 1))
        seconds, batch = _seconds(products), few
        many = take(whole, 0, min(batch_length(whole), MOST_RATE_SAMPLES))
        growth = batch_length(many) / batch_length(few) * MOST_RATE_ROWS / n_rows
        if seconds * growth <= RATE_SECONDS:
            batch, n_rows = many, MOST_RATE_ROWS
            seconds = _seconds(_products(model, batch, n_rows))
        n = batch_length(batch)
        gradient_seconds = _seconds(lambda: model.loss_gradients(batch).rows)
        gradients = model.loss_gradients(batch).rows
        rows = torch.ones(n_rows, risk.size, dtype=risk.dtype, device=risk.device)
        gemm_seconds = _seconds(lambda: rows @ gradients.T)
        return Rates(
            gradients=n / gradient_seconds,
            products=n * n_rows / max(seconds - fixed, 0.2 * seconds),
            flops=2.0 * n * n_rows * risk.size / gemm_seconds,
            fixed=fixed,
        )


@contextmanager
def _share_of_threads(sharing: int) -> Iterator[None]:
    """Compute with a share of the threads, as each of so many workers on this machine would."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // sharing))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _products(model: InfluenceFunctionModel, batch: Batch, n_rows: int) -> Callable[[], torch.Tensor]:
    """Return what multiplies so many rows with the curvature of a batch."""
    risk = model.risk
    operator = operator_class(model.second_order_mode)(EmpiricalRisk.over(LocalReducer(risk, batch)))
    rows = torch.ones(n_rows, risk.size, dtype=risk.dtype, device=risk.device)
    return lambda: operator.matmat(rows)


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    """Time calls after one to warm up, for the shortest: others may be interrupted by what else the machine does."""
    call()
    shortest = spent = _timed(call)
    for _ in range(MOST_REPEATS - 1):
        if spent >= RATE_SECONDS:
            break
        seconds = _timed(call)
        shortest, spent = min(shortest, seconds), spent + seconds
    return shortest


def _timed(call: Callable[[], torch.Tensor]) -> float:
    start = CLOCK()
    float(call().reshape(-1)[-1])  # waits for a GPU
    return max(CLOCK() - start, 1e-7)
