"""Gradients of single samples, and what is made from them.

Per-sample gradients are rows over the covered parameters, [n, p]. `mixed_gradients` differentiates
⟨∇θ ℓ(z), row⟩ by the input, one forward derivative along the row and one reverse derivative in x, so that the mixed
second derivative [n, p, *input] is never made. What vmap cannot take is done by plain autograd in a loop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vmap

from distinfluence.errors import DtypeError, NonFiniteError
from distinfluence.model.batch import Batch, batch_length, map_batch, take
from distinfluence.model.sample_risk import Parameters, SampleRisk
from distinfluence.model.untouched import double_differentiable, recordable

GRADIENT_BYTES = 256 * 2**20  # of per-sample gradients that are held at once
REUSED_BYTES = 32 * 2**20  # on a CPU, if that is enough for FEW_SAMPLES: what is larger is paged in anew each time
FEW_SAMPLES, ENOUGH_SAMPLES = 128, 256  # fewer make products with many rows slower; more than ENOUGH gain nothing
EVEN = 16  # samples of which a micro-batch is a multiple: products with other numbers take up to half as long again
ROW_BYTES = 512 * 2**20  # of tangents that one vectorised derivative may hold, by a rough estimate
_ROWS_THAT_FIT: WeakKeyDictionary[SampleRisk, int] = WeakKeyDictionary()  # found out where a GPU's memory ended
MOST_ROWS = 32  # at once on a CPU: fewer cost overhead, more leave its cache (tests/benchmarks/passes.py)
ON_GPU = 4  # times as many bytes, and twice that in rows: small pieces wait for Python (tests/benchmarks/gpu.py)

Value = Callable[[Parameters, Batch], Tensor]


@dataclass(frozen=True)
class SampleGradients:
    """Gradients of the samples of a batch. rows: [n, p]; values: [n], the losses or measurements themselves."""

    rows: Tensor
    values: Tensor

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of each row, [n]."""
        norms: Tensor = torch.linalg.vector_norm(self.rows, dim=1)
        return norms


def loss_gradients(risk: SampleRisk, batch: Batch) -> SampleGradients:
    """Gradient of each sample's training loss by the covered parameters; batch: as `SampleRisk.place` returns it."""
    return _gradients(risk, risk.losses, batch, "loss gradients")


def measurement_gradients(risk: SampleRisk, batch: Batch) -> SampleGradients:
    """Gradient of each sample's measurement by the covered parameters."""
    return _gradients(risk, risk.measurements, batch, "measurement gradients")


def output_gradients(risk: SampleRisk, batch: Batch, vectors: Tensor) -> SampleGradients:
    """Gradient of ⟨f(z_j, θ), v_j⟩ of each sample by the covered parameters. vectors: [n, *outputs]."""

    def value(parameters: Parameters, both: Batch) -> Tensor:
        assert isinstance(both, tuple)
        samples, v = both
        assert isinstance(v, Tensor)
        return (risk.outputs(parameters, samples) * v).flatten(1).sum(dim=1)

    return _gradients(risk, value, (batch, vectors), "output gradients")


def micro_batches(risk: SampleRisk, batch: Batch) -> Iterator[Batch]:
    """Yield the batch in pieces of `samples_at_once`."""
    n = batch_length(batch)
    step = samples_at_once(risk.size * risk.dtype.itemsize, risk.device.type == "cpu")
    for start in range(0, n, step):
        yield take(batch, start, min(start + step, n))


def samples_at_once(row: int, on_cpu: bool) -> int:
    """How many samples' gradients are held at once, in GRADIENT_BYTES; a single one may take more.

    row: bytes of one gradient. On a CPU few are better, as long as products with them are not slowed down by it.
    """
    if on_cpu:
        reused = REUSED_BYTES // row
        most = min(GRADIENT_BYTES // row, reused if reused >= FEW_SAMPLES else ENOUGH_SAMPLES)
    else:
        most = ON_GPU * GRADIENT_BYTES // row
    return most - most % EVEN if most > EVEN else max(1, most)


def rows_at_once(row: int, on_cpu: bool, most: int = MOST_ROWS) -> int:
    """How many rows [p] a vectorised derivative takes at once: about four copies of each must fit in ROW_BYTES.

    row: bytes of one. most: on a CPU.
    """
    if on_cpu:
        return max(1, min(most, ROW_BYTES // (4 * row)))
    return max(1, min(2 * ON_GPU * MOST_ROWS, ON_GPU * ROW_BYTES // (4 * row)))


def over_rows(
    risk: SampleRisk, of_one: Callable[..., Tensor], in_dims: Any, most: int = MOST_ROWS
) -> Callable[..., Tensor]:
    """vmap of a function over rows [k, p], the argument that comes first, `rows_at_once` of them at a time.

    On a GPU what a model holds for each row besides is not known before: where memory ends, half as many are taken from
    then on. in_dims: as `torch.func.vmap` has them.
    """
    on_cpu = risk.device.type == "cpu"

    def apply(*arguments: Any) -> Tensor:
        while True:
            known = rows_at_once(risk.size * risk.dtype.itemsize, on_cpu, most)
            step = min(known, _ROWS_THAT_FIT.get(risk, known))
            try:
                result: Tensor = vmap(of_one, in_dims=in_dims, chunk_size=step)(*arguments)
                return result
            except torch.OutOfMemoryError:
                if on_cpu or step == 1:
                    raise
            _ROWS_THAT_FIT[risk] = min(step, arguments[0].shape[0]) // 2 or 1
            torch.cuda.empty_cache()

    return apply


def _gradients(risk: SampleRisk, value: Value, batch: Batch, what: str) -> SampleGradients:
    seen: list[Tensor] = []  # the values next to the rows that the last call returned

    def vectorised(samples: Batch) -> Tensor:
        def one(parameters: Parameters, sample: Batch) -> Tensor:
            return value(parameters, map_batch(lambda tensor: tensor.unsqueeze(0), sample))[0]

        gradient, values = vmap(grad_and_value(one), in_dims=(None, 0))(risk.parameters, samples)
        seen[:] = [values]
        return risk.blocks.flatten(gradient, n_leading=1)

    def looped(samples: Batch) -> Tensor:
        rows, values = [], []
        for index in range(batch_length(samples)):
            with differentiable(risk) as parameters:
                own = value(parameters, take(samples, index, index + 1))[0]
                rows.append(flat_grad(risk, own, parameters))
            values.append(own.detach())
        seen[:] = [torch.stack(values)]
        return torch.stack(rows)

    n = batch_length(batch)
    with double_differentiable():
        way = risk.ways.choose(what, (vectorised, looped), take(batch, 0, min(n, 2)))
        rows = way(batch)
    # a loss against float64 targets is float64
    result = SampleGradients(rows, seen[0].detach().reshape(-1).to(risk.dtype))
    _check_finite(result, what)
    return result


def mixed_gradients(risk: SampleRisk, batch: Batch, rows: Tensor) -> Tensor:
    """∂/∂x ⟨∇θ ℓ(z_j, θ), row_i⟩ for every row and sample: rows [k, p] → [k, n, *input].

    Raises DtypeError where the input is not floating point (token ids have no derivative).
    """
    x = risk.objective.inputs(batch)
    if not x.is_floating_point():
        raise DtypeError(
            f"`mode='perturbation'` needs a floating-point input to differentiate by, got {x.dtype}. For token ids, "
            "let the objective's `inputs` return the embeddings."
        )

    def along(row: Tensor, parameters: Parameters, inputs: Tensor) -> Tensor:
        changed = risk.objective.replace_inputs(batch, inputs)
        tangent = risk.blocks.unflatten(row)
        directional: Tensor = jvp(lambda p: risk.losses(p, changed).sum(), (parameters,), (tangent,))[1]
        return directional

    def vectorised(some: Tensor) -> Tensor:
        by_input = over_rows(risk, grad(along, argnums=2), (0, None, None))
        return by_input(some, dict(risk.parameters), x)

    def looped(some: Tensor) -> Tensor:
        with differentiable(risk) as parameters:
            inputs = x.detach().requires_grad_()
            total = risk.losses(parameters, risk.objective.replace_inputs(batch, inputs)).sum()
            gradient = flat_grad(risk, total, parameters, create_graph=True)
            if not gradient.requires_grad:
                return torch.zeros(some.shape[0], *x.shape, dtype=x.dtype, device=x.device)
            slopes = [_or_zeros(gradient @ row, inputs) for row in some]
        return torch.stack(slopes)

    with double_differentiable():
        rows = recordable(rows)
        way = risk.ways.choose("mixed gradients", (vectorised, looped), rows[:1])
        result = way(rows)
    if not torch.isfinite(result).all():
        raise NonFiniteError(
            "`mode='perturbation'` met NaN or infinity in the derivative by the input. Look at the model's outputs for "
            "these samples."
        )
    return result


class differentiable:
    """Leaf copies of the covered parameters that record a graph, inside `torch.no_grad` too."""

    def __init__(self, risk: SampleRisk) -> None:
        self._risk = risk
        self._enable = torch.enable_grad()

    def __enter__(self) -> dict[str, Tensor]:
        self._enable.__enter__()
        return {name: p.detach().requires_grad_() for name, p in self._risk.parameters.items()}

    def __exit__(self, *exception: Any) -> None:
        self._enable.__exit__(*exception)


def flat_grad(risk: SampleRisk, value: Tensor, parameters: Parameters, create_graph: bool = False) -> Tensor:
    """Gradient [p] of a scalar by leaf parameters; zeros where it does not depend on them."""
    if not value.requires_grad:
        return torch.zeros(risk.size, dtype=risk.dtype, device=risk.device)
    gradient = torch.autograd.grad(
        value,
        list(parameters.values()),
        create_graph=create_graph,
        retain_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return risk.blocks.flatten(dict(zip(parameters, gradient, strict=True)))


def _or_zeros(value: Tensor, inputs: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(inputs)
    (slope,) = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    return slope.detach()


def _check_finite(gradients: SampleGradients, what: str) -> None:
    finite = torch.isfinite(gradients.norms) & torch.isfinite(gradients.values)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"`model` gives NaN or infinity in the {what} of samples {bad[:10]} of this batch ({len(bad)} of "
            f"{finite.numel()}). Look at these samples; a square root or logarithm at zero is a usual cause."
        )
