"""The model is evaluated on a few samples, checked, compared and timed, before anything is computed."""

import time
from collections.abc import Callable, Mapping, Sequence
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
from distinfluence.influence.scores import InfluenceMode
from distinfluence.model.batch import batch_length, take
from distinfluence.model.identity.probe import Checked, Probe
from distinfluence.model.reducer import LocalReducer
from distinfluence.model.risk import EmpiricalRisk
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


RATE_SAMPLES, RATE_ROWS = 32, 8  # of a calibration


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
    """

    remarks: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    nbytes: int
    built: int

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
        operator = operator_class(model.second_order_mode)(EmpiricalRisk.over(LocalReducer(risk, batch)))
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
